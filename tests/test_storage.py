"""Storage: local paths and URLs behave alike; what can be read is whole."""

import errno
import multiprocessing
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from tarflow_scale import storage
from tarflow_scale.errors import NotExclusive, StorageError


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "local" else f"memory://{tmp_path.name}-{request.node.name[:20]}"


def test_write_read_list_remove(root: str) -> None:
    location = storage.join(root, "a", "b.bin")
    storage.write_bytes(location, b"0123456789")
    assert storage.read_bytes(location) == b"0123456789"
    assert storage.read_range(location, 2, 5) == b"234"
    assert storage.read_range(location, 8, 20) == b"89"
    assert storage.size_bytes(location) == 10
    assert storage.list_names(root) == ["a"]
    assert storage.list_names(storage.join(root, "a")) == ["b.bin"]
    with storage.local_copy(location) as copy:
        assert storage.digest(copy) == storage.digest(b"0123456789")
    storage.remove(location)
    assert not storage.exists(location)
    storage.remove(location)
    storage.write_bytes(location, b"x")
    storage.remove_tree(storage.join(root, "a"))
    assert storage.list_names(root) == []


def test_create_has_one_winner(root: str) -> None:
    location = storage.join(root, "once")
    assert storage.create(location, b"first")
    assert not storage.create(location, b"second")
    assert storage.read_bytes(location) == b"first"


def test_only_old_temporary_files_are_abandoned(tmp_path: Path) -> None:
    for name in (".old.partial", ".young.partial", "old.tar", ".old"):
        (tmp_path / name).write_bytes(b"x")
        if "old" in name:
            os.utime(tmp_path / name, (1e9, 1e9))
    storage.remove_abandoned(str(tmp_path))
    assert storage.list_names(str(tmp_path)) == [".old", ".young.partial", "old.tar"]
    storage.remove_abandoned(str(tmp_path / "absent"))


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS], ids=errno.errorcode.get)
def test_create_has_one_winner_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refused)
    assert storage.create(str(tmp_path / "once"), b"first")
    assert not storage.create(str(tmp_path / "once"), b"second")
    assert (tmp_path / "once").read_bytes() == b"first"
    test_create_has_one_winner_among_processes(tmp_path / "race")
    monkeypatch.setattr("tarflow_scale.storage.files._rename_unless_there", refused)
    with pytest.raises(NotExclusive, match="must be on a file system with hard links or RENAME_NOREPLACE"):
        storage.create(str(tmp_path / "other"), b"first")
    assert storage.list_names(str(tmp_path)) == ["once", "race"]


def test_only_what_a_file_system_lacks_is_done_another_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "link", full)
    with pytest.raises(StorageError, match="No space left on device"):
        storage.create(str(tmp_path / "file"), b"content")
    assert list(tmp_path.iterdir()) == []


def test_shared_files_and_folders_have_their_mode_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        storage.write_bytes(str(tmp_path / "a/b/written"), b"x", shared=0o060)
        assert storage.create(str(tmp_path / "a/c/created"), b"x", shared=0o064)
        storage.write_bytes(str(tmp_path / "a/own"), b"x")
    finally:
        os.umask(before)
    modes = {str(one.relative_to(tmp_path)): stat.S_IMODE(one.stat().st_mode) for one in tmp_path.rglob("*")}
    assert modes == {
        "a": 0o2770,
        "a/b": 0o2770,
        "a/b/written": 0o660,
        "a/c": 0o2775,
        "a/c/created": 0o664,
        "a/own": 0o600,
    }


def test_a_shared_folder_has_one_maker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.mkdir

    def another_is_faster(self: Path, **more: Any) -> None:
        real(self, **more)
        if self.name.endswith(storage.PARTIAL):
            real(tmp_path / "shared")
            (tmp_path / "shared/file").write_bytes(b"there")

    monkeypatch.setattr(Path, "mkdir", another_is_faster)
    storage.make_folder(tmp_path / "shared", 0o060)
    assert (tmp_path / "shared/file").read_bytes() == b"there"
    assert storage.list_names(str(tmp_path)) == ["shared"]


def _race(folder: str, key: int, writer: int, barrier: object) -> bool:
    barrier.wait()  # type: ignore[attr-defined]
    return storage.create(f"{folder}/{key}", f"{writer}".encode())


def test_create_has_one_winner_among_processes(tmp_path: Path) -> None:
    keys, writers = 25, 4
    context = multiprocessing.get_context("fork")
    with context.Manager() as manager, context.Pool(writers) as pool:
        for key in range(keys):
            barrier = manager.Barrier(writers)
            wins = pool.starmap(
                _race, [(str(tmp_path), key, writer, barrier) for writer in range(writers)], chunksize=1
            )
            assert wins.count(True) == 1
            assert int((tmp_path / str(key)).read_text()) == wins.index(True)
    assert len(list(tmp_path.iterdir())) == keys  # no partial file is left


def test_a_failed_write_leaves_the_old_content_and_no_debris(root: str) -> None:
    location = storage.join(root, "file")
    storage.write_bytes(location, b"old")

    def fail_half_way() -> None:
        with storage.writing(location) as file:
            file.write(b"new")
            raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        fail_half_way()
    assert storage.read_bytes(location) == b"old"
    assert storage.list_names(root) == ["file"]


def test_a_missing_file_is_one_clear_line(root: str) -> None:
    location = storage.join(root, "absent")
    with pytest.raises(StorageError) as error:
        storage.read_bytes(location)
    assert str(error.value) == f"cannot read {location} (no such file); check the path"


@pytest.mark.parametrize("part", ["../up", "/root", "a/../../b", "nul\0"])
def test_a_name_cannot_leave_its_folder(part: str) -> None:
    with pytest.raises(StorageError, match="must not lead out of its folder"):
        storage.join("folder", part)


@pytest.mark.parametrize(
    ("home", "user"), [("~/r", str(os.getuid())), ("~nobody-of-this-name/r", "nobody-of-this-name")]
)
def test_a_home_folder_that_is_not_known_makes_no_stray_folder(
    home: str, user: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    with pytest.raises(
        StorageError, match=f"^{home}.* must begin with a home folder .got no home folder for user {user}"
    ):
        storage.write_bytes(f"{home}/file", b"content")
    assert not [*tmp_path.iterdir()]


def test_a_name_that_the_locale_cannot_encode_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsencode", lambda name: name.encode("ascii"))
    for look in (storage.list_names, storage.local, storage.read_bytes):
        with pytest.raises(StorageError, match=r"^r\xe9g must fit the locale's encoding .*; set LC_ALL=C.UTF-8$"):
            look("r\xe9g")


def test_a_full_disk_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match="No space left on device"):
        storage.write_bytes(str(tmp_path / "file"), b"content")
    assert list(tmp_path.iterdir()) == []


def test_links_that_lead_back_up_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/x").write_bytes(b"12")
    (tmp_path / "a/b/up").symlink_to(tmp_path / "a")
    (tmp_path / "a/again").symlink_to("..")
    (tmp_path / "other").symlink_to(tmp_path / "a/b")
    (tmp_path / "nothing").symlink_to(tmp_path / "absent")
    assert [(file.name, file.num_bytes) for file in storage.walk(str(tmp_path))] == [("a/b/x", 2), ("other/x", 2)]


def test_a_file_that_is_written_again_has_another_version(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"1")
    (first,) = storage.walk(str(tmp_path))
    os.utime(tmp_path / "x", ns=(0, first_time := 123456789))
    (second,) = storage.walk(str(tmp_path))
    assert first.version != second.version == str(first_time)


def test_whatever_a_store_raises_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fails:
        def cat_file(self, *_: object, **__: object) -> bytes:
            raise RuntimeError("could not connect\nto the endpoint")

    monkeypatch.setattr("tarflow_scale.storage.files.filesystem", lambda _: (Fails(), "x"))
    with pytest.raises(
        StorageError, match=r"^cannot read s3://b/x \(could not connect to the endpoint\); check the URL"
    ):
        storage.read_range("s3://b/x", 0, 1)
