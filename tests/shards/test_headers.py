"""Headers of tars: `plain_members` returns what `tarfile` returns, for good and for damaged tars."""

import io
import os
import tarfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.writer import TarWriter

from tarflow_scale.shards.headers import HashedStream, Member, UnusualHeader, members_by_tarfile, plain_members

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
KINDS = {
    tarfile.REGTYPE: "file",
    tarfile.AREGTYPE: "file",
    tarfile.CONTTYPE: "file",
    tarfile.LNKTYPE: "hard link",
    tarfile.SYMTYPE: "symbolic link",
    tarfile.DIRTYPE: "folder",
    tarfile.FIFOTYPE: "special",
}


def quickly(content: bytes) -> list[Member]:
    return compared(plain_members(io.BytesIO(content), len(content)))


def compared(members: Iterable[Member]) -> list[Member]:
    """Members without slashes at the end of folder names; releases of `tarfile` differ in how many they keep."""
    return [member._replace(name=member.name.rstrip("/")) if member.kind == "folder" else member for member in members]


def by_tarfile(content: bytes) -> list[Member]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return compared(members_by_tarfile(io.BytesIO(content)))


names = st.one_of(
    st.text("abé/._0", min_size=1, max_size=12),
    st.builds(lambda size, first: (first + "ab/é" * 80)[:size], st.integers(90, 300), st.sampled_from("/aé")),
    st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), min_size=1, max_size=20),
)
infos = st.tuples(
    names,
    st.sampled_from(list(KINDS)),
    st.binary(max_size=1100),
    names,
    st.sampled_from([0, 1.5, 8**12, 1_700_000_000.25]),
    st.sampled_from([0, 1000, 3_000_000_000]),
)


def tar_of(members: list[tuple[str, bytes, bytes, str, float, int]], form: int) -> bytes | None:
    """A tar of these members; None if they do not fit into the format."""
    buffer = io.BytesIO()
    try:
        with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
            for name, kind, content, target, modified, owner in members:
                info = tarfile.TarInfo(name)
                info.type, info.mtime, info.uid = kind, modified, owner
                info.linkname = target if KINDS[kind].endswith("link") else ""
                info.size = len(content) if KINDS[kind] == "file" else 0
                tar.addfile(info, io.BytesIO(content))
    except ValueError:
        return None
    return buffer.getvalue()


@settings(deadline=None, max_examples=100)
@given(st.lists(infos, max_size=3), st.sampled_from(list(FORMATS.values())))
def test_every_tar_of_tarfile_is_read_as_tarfile_reads_it(
    members: list[tuple[str, bytes, bytes, str, float, int]], form: int
) -> None:
    content = tar_of(members, form)
    if content is None:
        return
    try:
        quick = quickly(content)
    except UnusualHeader:
        quick = None
    assert quick is None or quick == by_tarfile(content)
    if all(set(name) <= set("abé") and kind == tarfile.REGTYPE for name, kind, *_ in members):
        assert quick is not None  # usual headers are read without `tarfile`


@settings(deadline=None, max_examples=200)
@given(
    st.lists(infos, min_size=1, max_size=2),
    st.sampled_from(list(FORMATS.values())),
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=3),
    st.booleans(),
    st.integers(0, 10_000),
)
def test_a_damaged_tar_is_read_as_tarfile_reads_it_or_left_to_it(
    members: list[tuple[str, bytes, bytes, str, float, int]],
    form: int,
    changes: list[tuple[int, int]],
    is_summed: bool,
    cut: int,
) -> None:
    whole = tar_of(members, form)
    if whole is None:
        return
    content = bytearray(whole)
    for place, value in changes:
        content[place % len(content)] = value
    if is_summed:  # so that damage meets the fields behind the sum
        for start in range(0, len(content) - 511, 512):
            if content[start + 257 : start + 262] == b"ustar":
                content[start + 148 : start + 156] = b" " * 8
                content[start + 148 : start + 156] = b"%06o\0 " % sum(content[start : start + 512])
    damaged = bytes(content[: len(content) - cut] if cut < len(content) // 2 else content)
    try:
        quick = quickly(damaged)
    except UnusualHeader:
        return
    assert quick == by_tarfile(damaged)


def write_pax(path: Path) -> None:
    """Write a fractional mtime, which needs a PAX header for every member, as webdataset does."""
    with TarWriter(str(path), encoder=False) as writer:
        for number in range(3):
            writer.write({"__key__": f"{number:04d}", "png": b"x" * 700, "cls": b"1"})


def write_base_256(path: Path) -> None:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("0.png"))
        info = tarfile.TarInfo("1.png")
        info.uid, info.size = 2**31, 5
        tar.addfile(info, io.BytesIO(b"12345"))
    content = bytearray(path.read_bytes())
    content[512 + 124 : 512 + 136] = b"\x80" + (5).to_bytes(11, "big")
    content[512 + 148 : 512 + 156] = b" " * 8
    content[512 + 148 : 512 + 156] = b"%06o\0 " % sum(content[512:1024])
    path.write_bytes(bytes(content))


def write_long_names(path: Path) -> None:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for kind in (tarfile.REGTYPE, tarfile.SYMTYPE):
            info = tarfile.TarInfo("d" * 150 + "/1.png")
            info.type, info.linkname = kind, "e" * 150
            tar.addfile(info)


@pytest.mark.parametrize("write", [write_pax, write_base_256, write_long_names])
def test_pax_times_long_names_and_large_numbers_take_the_quick_way(tmp_path: Path, write: Callable[..., None]) -> None:
    write(tmp_path / "a.tar")
    content = (tmp_path / "a.tar").read_bytes()
    assert quickly(content) == by_tarfile(content)
    assert len(quickly(content)) >= 2


@pytest.mark.parametrize("keyword", ["GNU.sparse.size", "GNU.sparse.map", "GNU.sparse.major"])
def test_sparse_members_are_left_to_tarfile(keyword: str) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("0.png")
        info.pax_headers = {keyword: "1"}
        tar.addfile(info)
    with pytest.raises(UnusualHeader):
        quickly(buffer.getvalue())


def test_a_size_beyond_the_tar_is_not_read(tmp_path: Path) -> None:
    write_base_256(tmp_path / "a.tar")
    content = bytearray((tmp_path / "a.tar").read_bytes())
    content[512 + 124 : 512 + 136] = b"\x80" + (2**60).to_bytes(11, "big")
    content[512 + 148 : 512 + 156] = b" " * 8
    content[512 + 148 : 512 + 156] = b"%06o\0 " % sum(content[512:1024])
    with pytest.raises(UnusualHeader, match="ends in a member"):
        quickly(bytes(content))


def test_a_hashed_stream_has_the_digest_of_all_of_it_whatever_is_read() -> None:
    import hashlib

    content = os.urandom(3_000_000)
    stream = HashedStream(io.BytesIO(content))
    assert stream.read(10) == content[:10]
    stream.seek(2_500_000)
    assert stream.read(5) == content[2_500_000:2_500_005]
    assert stream.seek(10_000_000) == len(content)
    assert stream.sha256.hexdigest() == hashlib.sha256(content).hexdigest()
