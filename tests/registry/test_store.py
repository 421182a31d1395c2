"""Blobs that are what they say, and a store that is asked whether it gives one winner."""

import itertools
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tarflow_scale import storage
from tarflow_scale.errors import RegistryError, StorageError
from tarflow_scale.registry import Registry, Store
from tests.registry.test_registry import FACTS


def test_init_sees_that_one_writer_wins_and_leaves_a_marker(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "r"))
    assert store.init().checked == "8 writers, 100 names, 100 winners"
    assert [path.name for path in (tmp_path / "r").iterdir()] == ["registry.json"]
    assert Store(str(tmp_path / "r")).init() == store.marker()


def test_a_store_without_create_if_absent_is_refused_or_has_one_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overwrites(location: str, content: bytes) -> bool:
        storage.write_bytes(location, content)
        return True

    monkeypatch.setattr(storage, "create", overwrites)
    with pytest.raises(
        RegistryError,
        match=r"create-if-absent \(8 writers competed for 100 names, and 800 creations succeeded\); use a",
    ):
        Store(str(tmp_path)).init()
    assert list(tmp_path.iterdir()) == []
    assert Store(str(tmp_path)).init(single_writer=True).single_writer
    registry = Registry(str(tmp_path), "m")
    assert [registry.register({"w": bytes([i])}, FACTS, "").version for i in range(3)] == [1, 2, 3]
    assert not registry.store.create(registry.log.location(2), b"other")


def test_a_remote_registry_is_tried_before_its_first_event(tmp_path: Path) -> None:
    registry = Registry(f"memory://{tmp_path.name}", "m")
    registry.register({"w": b"1"}, FACTS, "")
    marker = registry.store.marker()
    assert marker is not None
    assert marker.checked.endswith("100 winners")


def test_an_old_blob_that_is_named_again_is_young(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    record = store.keep(b"content")
    blob = Path(store.blob(record.sha256))
    old = time.time() - 10_000
    os.utime(blob, (old, old))
    assert store.keep(b"content") == record
    assert time.time() - blob.stat().st_mtime < 100
    assert store.blobs() == {record.sha256: 7}


@pytest.mark.parametrize("name", ["..", "a/b", "/etc", "", ".hidden", "x" * 101, "a\0"])
def test_names_stay_in_their_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(RegistryError, match="the name of a model must consist of letters"):
        Registry(str(tmp_path), name)
    registry = Registry(str(tmp_path), "m")
    registry.register({"w": b"1"}, FACTS, "")
    with pytest.raises(RegistryError, match="an alias must consist of letters"):
        registry.set_alias(name, 1, None, "")


def test_a_probe_whose_store_fails_once_ends_with_that_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = storage.create, itertools.count()

    def fails_once(location: str, content: bytes) -> bool:
        if next(calls) == 100:
            raise StorageError("cannot write (slow down)")
        return real(location, content)

    monkeypatch.setattr(storage, "create", fails_once)
    with pytest.raises(StorageError, match="slow down"):
        Store(str(tmp_path)).init()
    assert list(tmp_path.iterdir()) == []


def test_several_may_init_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: Store(str(tmp_path)).init(), range(3)))
    assert all(marker.checked.endswith("100 winners") for marker in found)
    assert [path.name for path in tmp_path.iterdir()] == ["registry.json"]
