"""Collection removes what nobody needs, and nothing else, however it is disturbed."""

import os
import time
from pathlib import Path

import pytest

from tarflow_scale.errors import RegistryError
from tarflow_scale.registry import Registry, collection
from tests.registry.test_registry import FACTS, registry_with

DAY = 86400.0


def age(path: Path, days: float) -> None:
    """Make every blob older, as time would."""
    for blob in (path / "blobs/sha256").iterdir():
        then = time.time() - days * DAY
        os.utime(blob, (then, then))


def weights(registry: Registry, version: int) -> Path:
    sha256 = registry.state().versions[version].files["model.safetensors"].sha256
    return Path(registry.store.blob(sha256))


@pytest.fixture
def aged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """Three versions: the first is champion, the second was retired ten days ago. And an upload that was dropped."""
    registry = registry_with(tmp_path, 3)
    registry.promote("champion", 1, None, {}, "")
    registry.retire(2, "worse")
    registry.keep(b"dropped")
    now = time.time()
    age(tmp_path, 10)
    monkeypatch.setattr("tarflow_scale.registry.collection.time.time", lambda: now + 10 * DAY)
    for blob in (tmp_path / "blobs/sha256").iterdir():
        os.utime(blob, (now, now))
    return registry


def test_retired_and_dropped_files_go_and_all_others_stay(aged: Registry) -> None:
    found = collection.garbage(aged.path, 7 * DAY)
    assert found.versions == {"m": [2]}
    assert len(found.blobs) == 2
    assert collection.garbage(aged.path, 11 * DAY).blobs == {}
    assert collection.collect(aged.path, found, 7 * DAY, "test") == sum(found.blobs.values())
    again = Registry(aged.path, "m")
    for version in (1, 3):
        assert set(again.read_files(again.resolve(version))) == {"model.safetensors", "config.json"}
    with pytest.raises(RegistryError, match="m@2 was retired and its files were deleted on"):
        again.read_files(again.resolve(2))
    after = collection.garbage(aged.path, 7 * DAY)
    assert (after.versions, after.blobs) == ({}, {})


def test_what_two_versions_or_two_models_share_stays(aged: Registry) -> None:
    """config.json is the same file in all versions; the weights of the retired one also belong to another model."""
    other = Registry(aged.path, "n")
    other.register({"model.safetensors": b"w1"}, FACTS, "the same weights")
    found = collection.garbage(aged.path, 7 * DAY)
    collection.collect(aged.path, found, 7 * DAY, "test")
    assert weights(aged, 2).exists()
    assert other.read_files(other.resolve(1)) == {"model.safetensors": b"w1"}


def test_a_collector_that_dies_after_its_event_is_finished_by_the_next(
    aged: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = collection.garbage(aged.path, 7 * DAY)

    def killed(_: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tarflow_scale.registry.collection.storage.remove", killed)
        with pytest.raises(KeyboardInterrupt):
            collection.collect(aged.path, found, 7 * DAY, "test")
    assert weights(aged, 2).exists()
    rest = collection.garbage(aged.path, 7 * DAY)
    assert rest.versions == {}
    assert rest.blobs == found.blobs
    collection.collect(aged.path, rest, 7 * DAY, "test")
    assert not weights(aged, 2).exists()
    assert weights(aged, 1).exists()


def test_a_file_that_is_named_again_between_the_look_and_the_removal_stays(aged: Registry) -> None:
    found = collection.garbage(aged.path, 7 * DAY)
    dropped = Path(aged.store.blob(aged.keep(b"dropped").sha256))
    later = time.time() + 10 * DAY
    os.utime(dropped, (later, later))  # `keep` has written it again, on the clock of this test
    collection.collect(aged.path, found, 7 * DAY, "test")
    assert dropped.exists()


def test_a_short_grace_period_is_refused(aged: Registry) -> None:
    with pytest.raises(RegistryError, match="the grace period must be at least 2 hours"):
        collection.garbage(aged.path, 60)


def test_a_retired_version_is_out_of_use(aged: Registry) -> None:
    assert aged.resolve("latest").version == 3
    for change in (
        lambda: aged.promote("champion", 2, 1, {}, ""),
        lambda: aged.set_alias("x", 2, None, ""),
        lambda: aged.approve(2, ""),
        lambda: aged.retire(2, ""),
    ):
        with pytest.raises(RegistryError, match="m@2 was retired on"):
            change()
    with pytest.raises(RegistryError, match=r"m@1 must have no alias to be retired \(got champion\); move the alias"):
        aged.retire(1, "")


def test_a_rollback_passes_over_retired_versions(tmp_path: Path) -> None:
    registry = registry_with(tmp_path, 4)
    for version, holder in ((1, None), (2, 1), (3, 2), (4, 3)):
        registry.promote("champion", version, holder, {}, "")
    registry.retire(3, "worse")
    assert registry.rollback("champion", "") == (4, 2)
    assert registry.rollback("champion", "") == (2, 1)
    with pytest.raises(RegistryError, match="has no earlier version"):
        registry.rollback("champion", "")
