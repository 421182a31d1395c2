"""Tars of other programs: the samples that were written are read, and errors are refused or reported."""

import gzip
import io
import json
import pickle
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from webdataset.shardlists import expand_urls
from webdataset.tariterators import base_plus_ext
from webdataset.writer import TarWriter

from tarflow_scale import cli, storage
from tarflow_scale.config.prepare import SourceConfig, SplitConfig
from tarflow_scale.errors import DataError
from tarflow_scale.shards.headers import Member, UnusualHeader
from tarflow_scale.shards.images import encode_image, encode_png
from tarflow_scale.shards.reader import ShardSet
from tarflow_scale.shards.sources import ImageSource, open_source
from tarflow_scale.shards.sources.tar_files import find_tars
from tarflow_scale.shards.sources.tar_rules import Rules, key_and_extension
from tarflow_scale.shards.sources.tar_scan import scan_tar

RNG = np.random.default_rng(0)


def images(num: int, size: int = 6, channels: int = 3) -> NDArray[np.uint8]:
    return RNG.integers(0, 256, (num, channels, size, size), np.uint8)


def opened(path: Path | str, split: dict[str, Any] | None = None, num_workers: int = 1, **options: Any) -> ImageSource:
    config = SourceConfig.model_validate({"kind": "webdataset", "path": str(path), **options})
    source = open_source(config, SplitConfig.model_validate(split or {}), num_workers)
    clone = pickle.loads(pickle.dumps(source))  # as a worker process gets it
    assert all(np.array_equal(clone.image(i), source.image(i)) for i in range(len(source)))
    assert [clone.origin(i) for i in range(len(source))] == [source.origin(i) for i in range(len(source))]
    return source


def write_foreign(path: Path, some: NDArray[np.uint8], per_tar: int = 3, extension: str = "jpg") -> None:
    """Write tars with webdataset itself."""
    path.mkdir(parents=True, exist_ok=True)
    for number in range(-(-len(some) // per_tar)):
        with TarWriter(str(path / f"shard-{number}.tar"), encoder=False) as writer:
            for i in range(number * per_tar, min(len(some), (number + 1) * per_tar)):
                content = encode_image(some[i], "png")
                writer.write({"__key__": f"dir/{i:04d}", extension: content, "cls": str(i % 4).encode()})


def test_tars_of_plain_webdataset_are_packed_again(tmp_path: Path) -> None:
    some = images(8)
    write_foreign(tmp_path / "in", some)
    source = opened(tmp_path / "in")
    assert source.labels.tolist() == [i % 4 for i in range(8)]
    assert all(np.array_equal(source.image(i), some[i]) for i in range(8))
    assert source.origin(3) == "shard-1.tar:dir/0003"


def test_tars_of_plain_webdataset_become_a_data_set_where_they_are(tmp_path: Path) -> None:
    some = images(8)
    write_foreign(tmp_path / "in", some)
    before = {file.name: file.read_bytes() for file in (tmp_path / "in").iterdir()}
    arguments = ["prepare", "source.kind=webdataset", f"source.path={tmp_path}/in", "source.in_place=true"]
    assert cli.main([*arguments, f"shards.path={tmp_path}/in"]) == 0
    assert all((tmp_path / "in" / name).read_bytes() == content for name, content in before.items())
    shards = ShardSet(str(tmp_path / "in"), verify="full")
    batch = shards.take(np.arange(8))
    assert np.array_equal(batch.events, some)
    assert batch.labels.tolist() == [i % 4 for i in range(8)]
    assert cli.main(["prepare", "--check", f"{tmp_path}/in"]) == 0
    assert cli.main([*arguments, f"shards.path={tmp_path}/in"]) == 0


def tar_of(path: Path, members: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(
    "damage", ["cut between samples", "cut in a header", "a bit of a header", "zeros over headers"]
)
def test_a_damaged_foreign_tar_is_not_taken_for_a_shorter_one(tmp_path: Path, damage: str, in_place: bool) -> None:
    write_foreign(tmp_path, images(6), per_tar=6)
    (tar,) = tmp_path.glob("*.tar")
    with tarfile.open(tar) as members:
        middle = members.getmembers()[6].offset
    content = bytearray(tar.read_bytes())
    match damage:
        case "cut between samples":
            content = content[:middle]
        case "cut in a header":
            content = content[: middle + 100]
        case "a bit of a header":
            content[middle + 150] ^= 1  # its checksum
        case _:
            content[middle : middle + 512] = bytes(512)
    tar.write_bytes(bytes(content))
    target = tmp_path if in_place else tmp_path / "out"
    more = ["source.in_place=true"] if in_place else []
    before = contents(tmp_path)
    arguments = ["prepare", "source.kind=webdataset", f"source.path={tmp_path}", f"shards.path={target}", *more]
    assert cli.main(arguments) == 2
    assert contents(tmp_path) == before


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_tars_that_were_written_again_are_another_source(tmp_path: Path) -> None:
    digests = set()
    for _ in range(2):
        write_foreign(tmp_path, images(3), extension="png")
        digests.add(opened(tmp_path).digest)
    assert len(digests) == 2


def test_tars_in_place_that_cannot_be_used_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = io.BytesIO()
    Image.fromarray(np.zeros((6, 6), np.uint16)).save(wide, "PNG")
    good = encode_png(images(1)[0])
    cases = {
        "labels that are read in place must be in .cls (got one in the .json of": [
            ("0.png", good),
            ("0.json", b'{"label": 1}'),
        ],
        "has more than 8 bits per channel": [("0.png", wide.getvalue()), ("0.cls", b"1")],
        "a label must be a whole number": [("0.png", good), ("0.cls", b"100000000000000000000")],
    }
    for number, (message, members) in enumerate(cases.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        tar_of(folder / "a.tar", members)
        arguments = ["prepare", "source.kind=webdataset", f"source.path={folder}", f"shards.path={folder}"]
        assert cli.main([*arguments, "source.in_place=true"]) == 2
        assert message in capsys.readouterr().err
        assert [file.name for file in folder.iterdir()] == ["a.tar"]
    (folder / "a.tar").rename(folder / "my data.tar")
    tar_of(folder / "my data.tar", [("0.png", good)])
    assert cli.main([*arguments, "source.in_place=true"]) == 2
    assert "the name of a shard must consist of letters, digits and ._-" in capsys.readouterr().err


def test_rectangles_are_indexed_in_place_if_they_have_one_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = {"one": [(3, 6, 9)] * 3, "two": [(3, 6, 9), (3, 9, 6)]}
    for name, sizes in shapes.items():
        (tmp_path / name).mkdir()
        pixels = [np.full(shape, number, np.uint8) for number, shape in enumerate(sizes)]
        tar_of(tmp_path / name / "a.tar", [(f"{i}.png", encode_png(image)) for i, image in enumerate(pixels)])
    arguments = ["prepare", "source.kind=webdataset", "source.in_place=true"]
    assert cli.main([*arguments, f"source.path={tmp_path}/one", f"shards.path={tmp_path}/one"]) == 0
    shards = ShardSet(f"{tmp_path}/one")
    assert shards.manifest.image_size_pixels == (6, 9)
    assert np.array_equal(shards.take(np.arange(3)).events[:, 0, 5, 8], [0, 1, 2])
    assert cli.main(["prepare", "--check", f"{tmp_path}/one"]) == 0
    assert cli.main([*arguments, f"source.path={tmp_path}/two", f"shards.path={tmp_path}/two"]) == 2
    said = capsys.readouterr().err
    assert "all images must have the same size (got 6x9 for" in said
    assert ", 9x6 for" in said
    assert [file.name for file in (tmp_path / "two").iterdir()] == ["a.tar"]


def test_tars_in_place_may_use_the_same_keys_but_not_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        tar_of(tmp_path / f"{name}.tar", [(f"{i}.png", encode_png(images(1)[0])) for i in range(3)])
    arguments = ["prepare", "source.kind=webdataset", f"source.path={tmp_path}", f"shards.path={tmp_path}"]
    assert cli.main([*arguments, "source.in_place=true"]) == 0
    assert cli.main(["prepare", "--check", str(tmp_path)]) == 0
    assert cli.main([*arguments, "source.in_place=true"]) == 0
    tar_of(tmp_path / "c.tar", [("0.png", encode_png(images(1)[0]))])
    capsys.readouterr()
    assert cli.main([*arguments, "source.in_place=true"]) == 2
    assert "must match its manifest (got c.tar, which is new" in capsys.readouterr().err


def test_foreign_tars_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    png = encode_png(images(1)[0])
    tar_of(tmp_path / "double/a.tar", [("1.png", png), ("2.png", png), ("1.cls", b"0")])
    tar_of(tmp_path / "half/a.tar", [("1.png", png), ("1.cls", b"0"), ("2.png", png)])
    tar_of(tmp_path / "text/a.tar", [("1.txt", b"x")])
    tar_of(tmp_path / "sizes/a.tar", [("1.png", png), ("2.png", encode_png(images(1, size=5)[0]))])
    tar_of(tmp_path / "cut/a.tar", [("1.png", encode_png(images(1, size=64)[0]))])
    whole = (tmp_path / "cut/a.tar").read_bytes()
    (tmp_path / "cut/a.tar").write_bytes(whole[:2048])
    (tmp_path / "none").mkdir()
    cases = {
        "double": "got other keys between members of 1 in",
        "half": "either all samples or none must have a label .got no label for .*2",
        "text": r"has no image \(members: txt\)",
        "cut": "is not a whole tar",
        "none": "no .tar file in",
    }
    for name, message in cases.items():
        with pytest.raises(DataError, match=message):
            opened(tmp_path / name)
    arguments = ["prepare", "source.kind=webdataset", "source.in_place=true"]
    for name in (*cases, "sizes"):
        path = tmp_path / name
        before = sorted(file.name for file in path.iterdir())
        assert cli.main([*arguments, f"source.path={path}", f"shards.path={path}"]) == 2
        assert sorted(file.name for file in path.iterdir()) == before


def resized(content: bytes, field: bytes) -> bytes:
    """A tar whose second header has a wrong size and a checksum that fits it."""
    changed = bytearray(content)
    at = 1024
    changed[at + 124 : at + 136] = field.ljust(12, b"\0")
    changed[at + 148 : at + 156] = b" " * 8
    changed[at + 148 : at + 156] = b"%06o\0 " % sum(changed[at : at + 512])
    return bytes(changed)


HOSTILE_SIZES = {
    "octal": b"77777777777",
    "negative octal": b"-0000002000",
    "negative": b"-0000000777",
    "binary": b"\x80\x7f" + b"\xff" * 10,
    "negative binary": b"\xff" * 10 + b"\xfc\0",  # -1024
}


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("field", HOSTILE_SIZES.values(), ids=HOSTILE_SIZES)
def test_a_size_that_is_not_that_of_the_bytes_is_refused(field: bytes, in_place: bool, tmp_path: Path) -> None:
    """A negative size would send a reader back to bytes that it has read, in an endless loop."""
    tar_of(tmp_path / "a.tar", [(f"{i}.txt", b"x") for i in range(3)])
    (tmp_path / "a.tar").write_bytes(resized((tmp_path / "a.tar").read_bytes(), field))
    check_refused(tmp_path, in_place)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_sparse_member_is_refused(in_place: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A sparse member of a few bytes may claim to be terabytes of zeros."""
    png = encode_png(images(1)[0])
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("0.png")
        info.size = len(png)
        words = {"size": str(1 << 40), "numblocks": "1", "map": f"0,{len(png)}", "name": "0.png"}
        info.pax_headers = {f"GNU.sparse.{key}": value for key, value in words.items()}
        tar.addfile(info, io.BytesIO(png))
        last = tarfile.TarInfo("1.png")
        last.size = len(png)
        tar.addfile(last, io.BytesIO(png))
    check_refused(tmp_path, in_place)
    assert "is not a whole tar ('0.png' is sparse)" in capsys.readouterr().err


def check_refused(path: Path, in_place: bool) -> None:
    before = contents(path)
    target = path if in_place else path / "out"
    more = ["source.in_place=true"] if in_place else []
    assert cli.main(["prepare", "source.kind=webdataset", f"source.path={path}", f"shards.path={target}", *more]) == 2
    assert contents(path) == before


def test_names_and_links_of_a_tar_reach_nothing_outside_of_it(tmp_path: Path) -> None:
    """No member is written to disk, so its name does no harm; links are followed only within the tar."""
    secret = tmp_path / "secret.png"
    secret.write_bytes(encode_png(images(1)[0]))
    picture = images(1)[0]
    source = tmp_path / "in"
    source.mkdir()
    with tarfile.open(source / "a.tar", "w") as tar:
        for kind, name in ((tarfile.SYMTYPE, "0.png"), (tarfile.LNKTYPE, "0.cls"), (tarfile.SYMTYPE, "../../1.txt")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(secret) if kind == tarfile.SYMTYPE else "../secret.png"
            tar.addfile(info)
        for name in (f"{tmp_path}/planted/2.png", "../../planted/3.png"):
            info = tarfile.TarInfo(name)
            info.size = len(encode_png(picture))
            tar.addfile(info, io.BytesIO(encode_png(picture)))
    before = contents(tmp_path)
    arguments = ["prepare", "source.kind=webdataset", f"source.path={source}", f"shards.path={tmp_path}/out"]
    assert cli.main([*arguments, "split.test_fraction=0"]) == 0
    assert {name for name in contents(tmp_path) if not name.startswith("out/")} == set(before)
    packed = ShardSet(f"{tmp_path}/out/train")
    assert (packed.take(np.arange(2)).events == picture).all()
    assert packed.manifest.num_images == 2


# --- splits and paths


SOME = images(12)
PNGS = [encode_png(image) for image in SOME]


def shard(path: Path, first: int, num: int = 2, labels: list[str] | None = None) -> None:
    """Write a tar of images, numbered from ``first``; by default their numbers are their labels."""
    members: list[tuple[str, bytes]] = []
    for i in range(first, first + num):
        label = str(i) if labels is None else labels[i - first]
        members += [(f"{i:03d}.png", PNGS[i])] + ([(f"{i:03d}.cls", label.encode())] if label else [])
    tar_of(path, members)


def split_of(source: ImageSource) -> dict[str, int]:
    assert source.official is not None
    return {source.origin(i): int(code) for i, code in enumerate(source.official)}


@pytest.mark.parametrize("pattern", ["imagenet-{}-000000.tar", "{}/000000.tar", "data/{}2017/x.tar"])
def test_tars_with_names_of_splits_are_these_splits_and_no_pool(tmp_path: Path, pattern: str) -> None:
    shard(tmp_path / pattern.format("train"), 0)
    shard(tmp_path / pattern.format("val"), 2)
    source = opened(tmp_path)
    assert sorted(split_of(source).values()) == [0, 0, 2, 2]
    assert all(code == (0 if "train" in origin else 2) for origin, code in split_of(source).items())
    assert "official split (train, validation as test)" in source.description
    assert any("val" in line and "validation split, 2 images" in line for line in source.lines)


def write_tar(path: Path, names: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name in names:
            content = encode_png(images(1)[0]) if name.endswith(".png") else b"1"
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_folders_in_tars_are_neither_splits_nor_classes_without_a_word(tmp_path: Path) -> None:
    write_tar(tmp_path / "a/x.tar", ["train/0.png", "train/0.cls", "test/1.png", "test/1.cls"])
    with pytest.raises(DataError, match=r"folders in tars must not be splits \(got x\.tar:test and x\.tar:train"):
        opened(tmp_path / "a")
    assert len(opened(tmp_path / "a", {"by_name": False})) == 2
    write_tar(tmp_path / "b/0.tar", ["train/0.png"])
    write_tar(tmp_path / "b/1.tar", ["val/0.png"])
    with pytest.raises(DataError, match=r"folders in tars must not be splits"):
        opened(tmp_path / "b")
    write_tar(tmp_path / "c/train-0.tar", ["train/0.png"])
    write_tar(tmp_path / "c/val-0.tar", ["val/0.png"])
    source = opened(tmp_path / "c")
    assert source.official is not None
    assert source.lines[-1] == "no labels (the tars hold only images)"
    write_tar(tmp_path / "d/x.tar", ["cat/0.png", "dog/0.png"])
    (line,) = opened(tmp_path / "d").lines
    assert "folders in tars are not classes (got cat, dog); if they should be classes, unpack the tars" in line


def test_tars_whose_names_hide_a_split_are_refused(tmp_path: Path) -> None:
    for name in ("mytrain0", "mytrain1", "mytest0"):
        write_tar(tmp_path / f"{name}.tar", ["0.png"])
    with pytest.raises(DataError, match=r"got mytrain0\.tar and mytest0\.tar\); .*split\.train and split\.test"):
        opened(tmp_path)
    assert opened(tmp_path, {"train": ["mytrain*"], "test": ["mytest*"]}).official is not None


def test_tars_of_which_some_names_mean_a_split_are_refused(tmp_path: Path) -> None:
    shard(tmp_path / "train-0.tar", 0)
    shard(tmp_path / "part-0.tar", 2)
    with pytest.raises(DataError, match=r"either all tars or none must belong to a split .*part-0.tar"):
        opened(tmp_path)
    assert opened(tmp_path, {"by_name": False}).official is None
    source = opened(tmp_path, {"ignore": ["part-*"]})
    assert len(source) == 2
    assert "left out: part-0.tar (split.ignore)" in source.lines
    assert sorted(split_of(opened(tmp_path, {"test": ["part-*"]})).values()) == [0, 0, 2, 2]


@pytest.mark.parametrize("labels", [["-1", "-1"], ["", ""]])
def test_a_test_split_without_labels_is_left_out_and_reported(tmp_path: Path, labels: list[str]) -> None:
    shard(tmp_path / "train-0.tar", 0)
    shard(tmp_path / "val-0.tar", 2)
    shard(tmp_path / "test-0.tar", 4, labels=labels)
    source = opened(tmp_path)
    assert [source.origin(i).partition("-")[0] for i in range(4)] == ["train", "train", "val", "val"]
    assert len(source) == 4
    assert any(
        line.startswith("left out: test-0.tar (test split, 2 images), which has no labels") for line in source.lines
    )


def test_a_split_with_labels_for_some_samples_is_refused(tmp_path: Path) -> None:
    shard(tmp_path / "train-0.tar", 0)
    shard(tmp_path / "val-0.tar", 2, labels=["1", ""])
    with pytest.raises(
        DataError, match=r"either all samples or none must have a label \(got no label for val-0.tar:003\)"
    ):
        opened(tmp_path)


def test_a_source_is_one_tar_or_a_pattern_of_tars(tmp_path: Path) -> None:
    for number in range(3):
        shard(tmp_path / f"a/s-{number:02d}.tar", 2 * number)
    shard(tmp_path / "b/train-0.tar", 6)
    shard(tmp_path / "b/val-0.tar", 8)
    cases = {
        "a/s-01.tar": ["s-01.tar"],
        "a/s-{00..01}.tar": ["s-00.tar", "s-01.tar"],
        "a/s-0[02].tar": ["s-00.tar", "s-02.tar"],
        "**/s-*.tar": ["s-00.tar", "s-01.tar", "s-02.tar"],
        "{a,b}/*0.tar": ["a/s-00.tar", "b/train-0.tar", "b/val-0.tar"],
    }
    for pattern, names in cases.items():
        assert find_tars(f"{tmp_path}/{pattern}").names == names, pattern
    assert find_tars(f"{tmp_path}/a/s-00.tar::{tmp_path}/b/val-0.tar").names == ["a/s-00.tar", "b/val-0.tar"]
    source = opened(tmp_path / "a/s-{00..01}.tar")
    assert (len(source), source.name, source.origin(3)) == (4, "a", "s-01.tar:003")
    assert opened(tmp_path / "a/s-02.tar").name == "s-02"
    assert split_of(opened(f"{tmp_path}/b/*.tar"))["val-0.tar:008"] == 2


@pytest.mark.parametrize("pattern", ["d/x-{000..012}.tar", "{a,b{c,d}}/x.tar", "a.tar::b-{0..1}.tar"])
def test_braces_mean_what_they_mean_to_webdataset(tmp_path: Path, pattern: str) -> None:
    path = "::".join(f"{tmp_path}/{part}" for part in pattern.split("::"))
    expanded = expand_urls(path)
    assert len(expanded) > 1
    for tar in expanded:
        shard(Path(tar), 0)
    tars = find_tars(path)
    assert [f"{tars.root}/{name}" for name in tars.names] == expanded


def test_tars_of_a_store_are_a_folder_a_tar_or_a_pattern(tmp_path: Path) -> None:
    for name in ("train-0", "val-0"):
        shard(tmp_path / f"{name}.tar", 0 if name == "train-0" else 2)
        storage.write_bytes(f"memory://tars/in/{name}.tar", (tmp_path / f"{name}.tar").read_bytes())
    for path in ("memory://tars/in", "memory://tars/in/{train,val}-0.tar", "memory://tars/*/*-0.tar"):
        assert sorted(split_of(opened(path)).values()) == [0, 0, 2, 2]
    assert opened("memory://tars/in/val-0.tar").origin(0) == "val-0.tar:002"


def test_a_pattern_that_is_ignored_altogether_is_named(tmp_path: Path) -> None:
    shard(tmp_path / "train-0.tar", 0)
    shard(tmp_path / "val-0.tar", 2)
    with pytest.raises(DataError, match=r"split.test must match images .got none, because split.ignore matches"):
        opened(tmp_path, {"test": ["val-*"], "ignore": ["val-0*"]})


def test_paths_that_mean_no_tars_are_named(tmp_path: Path) -> None:
    shard(tmp_path / "a/s-00.tar", 0)
    cases = {
        "a/s-{00..01}.tar": "there is no .*s-01.tar",
        "a/x-*.tar": "matches nothing",
        "absent": "there is no .*absent; check source.path",
        "a/{s-00": "source.path must be a folder, a tar or a pattern",
        "a/s-{00,00}.tar": "must name every tar only once",
    }
    for pattern, message in cases.items():
        with pytest.raises(DataError, match=message):
            find_tars(f"{tmp_path}/{pattern}")


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar"])
def test_a_compressed_tar_is_refused_with_the_command_that_helps(tmp_path: Path, name: str) -> None:
    shard(tmp_path / "plain.tar", 0)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(gzip.compress((tmp_path / "plain.tar").read_bytes()))
    for path in (tmp_path / "in", tmp_path / "in" / name):
        with pytest.raises(DataError, match=rf"must not be compressed.*{name}\); run gunzip on it"):
            opened(path)
    (tmp_path / "in" / name).rename(tmp_path / "in/a.tar.zst")
    with pytest.raises(DataError, match="run zstd -d on it"):
        opened(tmp_path / "in")


def test_a_data_set_that_was_packed_below_a_source_is_no_part_of_it(tmp_path: Path) -> None:
    shard(tmp_path / "in/train/a.tar", 0)
    shard(tmp_path / "in/val/a.tar", 2)
    arguments = ["prepare", "source.kind=webdataset", f"source.path={tmp_path}/in"]
    assert cli.main([*arguments, f"shards.path={tmp_path}/in/out"]) == 0
    source = opened(tmp_path / "in")
    assert len(source) == 4
    assert any(line.startswith("left out: out/test, out/train (packed data set)") for line in source.lines)
    assert sorted(split_of(opened(tmp_path / "in/out")).values()) == [0, 0, 2, 2]


# --- images, labels and what is neither


@given(st.text("ab._-/é", max_size=12))
def test_keys_and_extensions_are_those_of_webdataset(name: str) -> None:
    if not name.rpartition("/")[2].startswith("."):
        key, extension = base_plus_ext(name)
        assert key_and_extension(name) == (None if key is None else (key, extension.lower()))


def test_two_images_under_one_key_are_asked_about_and_never_guessed(tmp_path: Path) -> None:
    mask = encode_png(np.zeros((1, 6, 6), np.uint8))
    for second in ("jpg", "seg.png", "webp"):
        tar_of(
            tmp_path / second / "a.tar",
            [(f"{i}.{e}", c) for i in range(2) for e, c in (("png", PNGS[i]), (second, mask))],
        )
        with pytest.raises(DataError, match=rf"one image \(got png and {second} for a.tar:0.*source.image_member=png"):
            opened(tmp_path / second)
        assert np.array_equal(opened(tmp_path / second, image_member="PNG").image(1), SOME[1])
        assert not opened(tmp_path / second, image_member=f".{second}").image(0).any()
        with pytest.raises(DataError, match=r"has no gif \(members: "):
            opened(tmp_path / second, image_member="gif")


def test_names_with_dots_are_explained_and_an_image_with_a_long_extension_is_one(tmp_path: Path) -> None:
    tar_of(tmp_path / "dots/a.tar", [("22.05.png", PNGS[0]), ("22.06.png", PNGS[1]), ("v1.2/23.png", PNGS[2])])
    with pytest.raises(
        DataError, match=r"got 05.png and 06.png for a.tar:22, since a key ends at the first dot .*renam"
    ):
        opened(tmp_path / "dots")
    tar_of(tmp_path / "long/a.tar", [("v1.2/0.input.PNG", PNGS[0]), ("v1.2/0.target.cls", b"3")])
    source = opened(tmp_path / "long")
    assert np.array_equal(source.image(0), SOME[0])
    assert (source.origin(0), source.labels.tolist()) == ("a.tar:v1.2/0", [3])


def labelled(path: Path, extension: str, contents: list[bytes]) -> Path:
    members = [m for i, c in enumerate(contents) for m in ((f"{i}.png", PNGS[i]), (f"{i}.{extension}", c))]
    tar_of(path / "a.tar", members)
    return path


LABELS: dict[str, tuple[str, list[bytes], dict[str, str], tuple[str, ...], list[int]]] = {
    "numbers with line ends": ("cls", [b"1\r\n", b"0\r\n"], {}, ("0", "1"), [1, 0]),
    "text": ("cls", [b"dog\r\n", b"cat\n"], {}, ("cat", "dog"), [1, 0]),
    "a text file": ("txt", [b"dog", b"cat"], {"label_column": "txt"}, ("cat", "dog"), [1, 0]),
    "a field": ("json", [b'{"c": "b"}', b'{"c": "a"}'], {"label_column": "c"}, ("a", "b"), [1, 0]),
    "a field in one": (
        "json",
        [b'{"a": {"b": 1}}', b'{"a": {"b": 0}}'],
        {"label_column": "a.b"},
        ("0", "1"),
        [1, 0],
    ),
    "the usual field": ("json", [b'{"label": 1}', b'{"label": 0}'], {}, ("0", "1"), [1, 0]),
    "no label": ("cls", [b"-1", b"-1"], {}, (), [0, 0]),
    "captions that nobody named": ("txt", [b"a dog", b"a cat"], {}, (), [0, 0]),
}


@pytest.mark.parametrize("case", LABELS)
def test_labels_are_numbers_or_text_of_a_member_or_a_json_field(tmp_path: Path, case: str) -> None:
    extension, contents, options, class_names, labels = LABELS[case]
    source = opened(labelled(tmp_path, extension, contents), **options)
    assert (source.class_names, source.labels.tolist()) == (class_names, labels)
    assert any("source.label_column" in line for line in source.lines) == (case == "captions that nobody named")


def test_a_table_of_names_names_the_classes_and_is_part_of_the_digest(tmp_path: Path) -> None:
    labelled(tmp_path / "in", "cls", [b"1", b"0"])
    digests = set()
    for names in (["tabby cat", "dog"], ["cat", "dog"]):
        (tmp_path / "names.json").write_text(json.dumps(names))
        source = opened(tmp_path / "in", label_names=str(tmp_path / "names.json"))
        assert (source.class_names, source.labels.tolist()) == (tuple(names), [1, 0])
        digests.add(source.digest)
    assert len(digests) == 2


def test_labels_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    several = labelled(tmp_path / "several", "json", [b'{"label": [0, 2]}'])
    with pytest.raises(DataError, match=r"a label must be one whole number or text \(got '\[0, 2\]' for a.tar:0\)"):
        opened(several)
    with pytest.raises(DataError, match=r"source.label_column must name a member or .*got 'labl'.*members: png, json"):
        opened(several, label_column="labl")
    tar_of(tmp_path / "two/a.tar", [("0.png", PNGS[0]), ("0.fine.cls", b"1"), ("0.coarse.cls", b"0")])
    with pytest.raises(DataError, match=r"one label \(got fine.cls and coarse.cls for a.tar:0\); choose one"):
        opened(tmp_path / "two")
    assert opened(tmp_path / "two", label_column="fine.cls").labels.tolist() == [1]


JUNK = ("._000.png", ".DS_Store", "__MACOSX/000.png", "d/Thumbs.db", ".hidden/000.png", "__MACOSX/._000.png")


def test_files_that_are_no_samples_are_passed_over_and_counted(tmp_path: Path) -> None:
    members = [(name, b"no image") for name in JUNK[:3]]
    members += [("./000.png", PNGS[0]), (JUNK[3], b""), ("./000.cls", b"1"), (JUNK[4], b"x"), (JUNK[5], b"x")]
    members += [
        ("__info__.json", b"{}"),
        ("README", b"x"),
        ("LICENSE.txt", b"x"),
        ("./001.png", PNGS[1]),
        ("./001.cls", b"0"),
    ]
    tar_of(tmp_path / "in/a.tar", members)
    (tmp_path / "in/._a.tar").write_bytes(b"x")
    (tmp_path / "in/notes.md").write_bytes(b"x")
    source = opened(tmp_path / "in")
    assert source.labels.tolist() == [1, 0]
    assert all(np.array_equal(source.image(i), SOME[i]) for i in range(2))
    assert dict(source.ignored) == {
        **{"._*": 2, ".DS_Store": 1, "__MACOSX": 2, "Thumbs.db": 1, ".hidden": 1, "__info__.json": 1},
        **{"README": 1, "LICENSE.txt": 1, "*.md": 1},
    }


def test_samples_without_an_image_are_counted_and_reported(tmp_path: Path) -> None:
    tar_of(tmp_path / "a.tar", [("0.png", PNGS[0]), ("1.json", b"{}"), ("2.json", b"{}"), ("3.png", PNGS[3])])
    source = opened(tmp_path)
    assert [source.origin(i) for i in range(len(source))] == ["a.tar:0", "a.tar:3"]
    assert any(
        "left out: 2 samples without an image, for example, a.tar:1 has no image" in line for line in source.lines
    )


def test_a_name_that_a_tar_has_twice_is_refused(tmp_path: Path) -> None:
    tar_of(tmp_path / "a.tar", [("0.png", PNGS[0]), ("0.png", PNGS[1])])
    with pytest.raises(DataError, match=r"a tar must hold each member name once \(got 0.png twice"):
        opened(tmp_path)


def link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def write_links(path: Path) -> None:
    """The tar has hard and symbolic links to members, to links, to later members, and to nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:

        def add(name: str, content: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))

        add("d/0.png", PNGS[0])
        add("d/0.cls", b"5")
        tar.addfile(link("d/1.png", "d/0.png", tarfile.LNKTYPE))
        tar.addfile(link("d/1.cls", "./d/0.cls", tarfile.LNKTYPE))
        tar.addfile(link("d/2.png", "1.png", tarfile.SYMTYPE))
        add("d/2.cls", b"6")
        tar.addfile(link("d/3.png", "../e/4.png", tarfile.SYMTYPE))
        add("d/3.cls", b"7")
        add("e/4.png", PNGS[4])
        add("e/4.cls", b"8")
        tar.addfile(link("e/5.png", "e/6.png", tarfile.SYMTYPE))
        tar.addfile(link("e/6.png", "6.png", tarfile.SYMTYPE))


def test_links_in_a_tar_are_followed_or_counted(tmp_path: Path) -> None:
    write_links(tmp_path / "a.tar")
    source = opened(tmp_path)
    assert source.labels.tolist() == [5, 5, 6, 7, 8]
    wanted = [0, 0, 0, 4, 4]
    assert all(np.array_equal(source.image(i), SOME[n]) for i, n in enumerate(wanted))
    assert dict(source.ignored) == {"link without a target in its tar": 2}


def test_links_of_samples_in_place_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_links(tmp_path / "a.tar")
    check_refused(tmp_path, in_place=True)
    assert "links cannot be read in place (got a link in the sample a.tar:d/1" in capsys.readouterr().err


# --- in place


def in_place(path: Path, *more: str) -> int:
    arguments = ["prepare", "source.kind=webdataset", f"source.path={path}", f"shards.path={path}", *more]
    return cli.main([*arguments, "source.in_place=true"])


def test_tars_in_place_of_several_splits_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard(tmp_path / "imagenet-train-0.tar", 0)
    shard(tmp_path / "imagenet-val-0.tar", 2)
    check_refused(tmp_path, in_place=True)
    error = capsys.readouterr().err
    assert (
        "tars that are indexed in place must belong to one split (got validation in imagenet-val-0.tar and train in"
        in error
    )
    assert "move each split to its own folder, or set source.in_place=false" in error
    (tmp_path / "imagenet-val-0.tar").rename(tmp_path / "imagenet-train-1.tar")
    assert in_place(tmp_path) == 0


def test_tars_in_place_with_files_that_are_no_samples_are_read_as_they_were_packed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    junk = [(name, PNGS[9]) for name in (".png", "._000.png", ".DS_Store", "__MACOSX/x.cls")]
    members = [
        *junk,
        ("000.png", PNGS[0]),
        ("000.cls", b"1"),
        *junk,
        ("001.png", PNGS[1]),
        ("001.cls", b"0\r\n"),
        *junk,
    ]
    tar_of(tmp_path / "a.tar", members)
    assert in_place(tmp_path) == 0
    assert "3 ._*" in capsys.readouterr().out
    batch = ShardSet(str(tmp_path), verify="full").take(np.arange(2))
    assert np.array_equal(batch.events, SOME[:2])
    assert batch.labels.tolist() == [1, 0]


def test_training_never_reads_a_mask_of_tars_in_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mask = encode_png(np.zeros((3, 6, 6), np.uint8))
    for second, name in (("seg.png", "seg"), ("jpg", "jpg")):
        members = [(f"{i}.{e}", c) for i in range(2) for e, c in (("png", PNGS[i]), (second, mask))]
        tar_of(tmp_path / name / "a.tar", members)
        check_refused(tmp_path / name, in_place=True)
        assert "choose one with source.image_member=png" in capsys.readouterr().err
        assert in_place(tmp_path / name, f"source.image_member={second}") == 2
        assert "must be the member that training reads in place (got the members" in capsys.readouterr().err
        assert in_place(tmp_path / name, "source.image_member=png") == 0
        assert np.array_equal(ShardSet(str(tmp_path / name)).take(np.arange(2)).events, SOME[:2])


def test_tars_in_place_with_labels_that_training_cannot_read_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = {
        "labels that are read in place must be whole numbers (got b'cat' in .cls": [
            ("0.png", PNGS[0]),
            ("0.cls", b"cat"),
        ],
        "labels that are read in place must be in .cls (got one in another member": [
            ("0.png", PNGS[0]),
            ("0.target.cls", b"1"),
        ],
        "every sample must have an image (a.tar:1 has no image": [("0.png", PNGS[0]), ("1.cls", b"1")],
        "(got the members input.png for ": [("0.input.png", PNGS[0])],
    }
    for number, (message, members) in enumerate(cases.items()):
        tar_of(tmp_path / str(number) / "a.tar", members)
        check_refused(tmp_path / str(number), in_place=True)
        assert message in capsys.readouterr().err


def test_in_place_wants_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard(tmp_path / "a.tar", 0)
    assert in_place(tmp_path / "a.tar") == 2
    assert "source.in_place needs a folder of tars" in capsys.readouterr().err
    shard(tmp_path / "in/train/a.tar", 0)
    assert in_place(tmp_path / "in") == 2
    assert "(got train/a.tar in a subfolder); index each folder separately" in capsys.readouterr().err
    shard(tmp_path / "in/b.tar", 2)
    assert in_place(tmp_path / "in") == 0
    assert "files that are not packed: 1 tar in a subfolder" in capsys.readouterr().out


# --- many


def test_workers_find_what_one_process_finds(tmp_path: Path) -> None:
    for number in range(3):
        shard(tmp_path / f"{number}.tar", 4 * number, 4, labels=[f"c{number}", "a", "b", "c"])
    alone, shared = opened(tmp_path), opened(tmp_path, num_workers=2)
    assert (alone.digest, alone.class_names, alone.labels.tolist()) == (
        shared.digest,
        shared.class_names,
        shared.labels.tolist(),
    )
    assert [alone.origin(i) for i in range(12)] == [shared.origin(i) for i in range(12)]
    tar_of(tmp_path / "1.tar", [("0.png", PNGS[0]), ("0.cls", b"")])
    with pytest.raises(DataError, match=r"a label must be one whole number or text \(got \"b''\" for 1.tar:0\)"):
        opened(tmp_path, num_workers=2)


def test_a_sample_costs_a_worker_less_than_a_hundred_bytes(tmp_path: Path) -> None:
    tar_of(
        tmp_path / "in/a.tar", [(f"{i:05d}.{e}", c) for i in range(3000) for e, c in (("cls", b"1"), ("png", PNGS[0]))]
    )
    assert len(pickle.dumps(open_source(SourceConfig(kind="webdataset", path=str(tmp_path / "in"))))) < 100 * 3000


def rare(*_: object) -> Iterator[Member]:
    raise UnusualHeader("of a rare kind")


def test_the_quick_way_and_tarfile_scan_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_foreign(tmp_path / "in", SOME, per_tar=12)
    write_links(tmp_path / "in/b.tar")
    for name in ("shard-0.tar", "b.tar"):
        quick = scan_tar(name, str(tmp_path / "in"), Rules())
        with monkeypatch.context() as patch:
            patch.setattr("tarflow_scale.shards.sources.tar_scan.plain_members", rare)
            slow = scan_tar(name, str(tmp_path / "in"), Rules())
        assert (quick.keys, quick.labels, quick.sha256, quick.linked) == (
            slow.keys,
            slow.labels,
            slow.sha256,
            slow.linked,
        )
        assert np.array_equal(quick.places, slow.places)
        assert quick.sha256 == storage.digest(tmp_path / "in" / name)
