"""The fold and its snapshot: whatever a snapshot says, the state is that of the log."""

import time
from pathlib import Path
from typing import Any

import pytest

from tarflow_scale import storage
from tarflow_scale.errors import RegistryError
from tarflow_scale.registry import Registry
from tests.registry.test_registry import FACTS, registry_with, report


def busy(path: Path) -> Registry:
    """A registry with every kind of event, and enough of them for a snapshot."""
    registry = registry_with(path, 40)
    for number in range(1, 9):
        registry.attach_report(report(number, registry.resolve(number).weights_digest), "test")
    registry.approve(3, "looks good")
    registry.promote("champion", 1, None, {"gate": "g"}, "")
    registry.promote("champion", 3, 1, {"gate": "g"}, "")
    registry.set_alias("stable", 2, None, "")
    registry.rollback("champion", "")
    registry.retire(5, "trained on the test split")
    return registry


def facts_of(registry: Registry) -> bytes:
    return registry.state().to_snapshot()


def test_with_a_snapshot_without_and_by_replay_the_state_is_the_same(tmp_path: Path) -> None:
    registry = busy(tmp_path)
    snapshot = tmp_path / "m/_snapshot"
    assert snapshot.exists()
    expected = facts_of(registry)
    assert facts_of(Registry(str(tmp_path), "m")) == expected
    assert Registry(str(tmp_path), "m").replayed().to_snapshot() == expected
    snapshot.unlink()
    assert facts_of(Registry(str(tmp_path), "m")) == expected


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "of another registry"])
def test_a_bad_snapshot_is_not_believed(tmp_path: Path, damage: str) -> None:
    registry = busy(tmp_path / "r")
    expected = facts_of(registry)
    snapshot = tmp_path / "r/m/_snapshot"
    content = snapshot.read_bytes()
    if damage == "flipped":
        content = content.replace(b'"stable":2', b'"stable":3') if b'"stable":2' in content else content[:-9] + b"X"
    elif damage == "cut":
        content = content[:-100]
    elif damage == "empty":
        content = b""
    else:
        registry_with(tmp_path / "other", 60)
        content = (tmp_path / "other/m/_snapshot").read_bytes()
    snapshot.write_bytes(content)
    assert facts_of(Registry(str(tmp_path / "r"), "m")) == expected


def test_reading_and_writing_ask_for_few_files_however_long_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry_with(tmp_path, 130)
    asked: list[str] = []
    for name in ("read_bytes", "read_if_there", "exists", "create", "write_bytes", "list_names", "modified_seconds"):
        real = getattr(storage, name)

        def counted(location: str, *more: Any, _real: Any = real) -> Any:
            asked.append(location)
            return _real(location, *more)

        monkeypatch.setattr(storage, name, counted)
    registry = Registry(str(tmp_path), "m")
    registry.attach_report(report(7, registry.resolve(7).weights_digest), "test")
    events = [location for location in asked if "/_log/" in location]
    assert len(events) <= 50 + 8  # those since the snapshot, one of the snapshot, and a look behind the end
    asked.clear()
    registry.attach_report(report(8, registry.resolve(8).weights_digest), "test")
    assert len(asked) <= 8
    names = [location for location in asked if location.endswith("_log")]
    assert not names  # a listing grows with the log


def test_an_event_that_disappears_is_noticed(tmp_path: Path) -> None:
    registry_with(tmp_path, 60)
    (tmp_path / "m/_log/000000000058.json").unlink()
    with pytest.raises(RegistryError, match="000000000058.json is missing from the log"):
        Registry(str(tmp_path), "m").state()


def test_a_long_log(tmp_path: Path) -> None:
    """The state of a long log is right, and its snapshot has it all; times are measured elsewhere."""
    registry = registry_with(tmp_path, 3)
    folder = tmp_path / "m/_log"
    state, weights = registry.state(), registry.resolve(2).weights_digest
    payload = {"report": report(2, weights).model_dump(mode="json")}
    from tarflow_scale.registry.log import new_event

    digest = state.digest
    for number in range(4, 2004):
        content = new_event(number, "evaluate", str(number), "test", digest, payload).to_json()
        (folder / f"{number:012d}.json").write_bytes(content)
        digest = storage.digest(content)
    started = time.perf_counter()
    cold = Registry(str(tmp_path), "m").state()
    assert cold.number == 2003
    assert len(cold.reports[2]) == 2000
    warm = Registry(str(tmp_path), "m").state()
    assert warm.to_snapshot() == cold.to_snapshot()
    print(f"{time.perf_counter() - started:.2f} s")


def test_a_version_of_the_future_is_one_line(tmp_path: Path) -> None:
    registry_with(tmp_path, 1)
    (tmp_path / "registry.json").write_text('{"format": 2}')
    with pytest.raises(
        RegistryError, match=r"has registry format 2 \(this version of tarflow-scale reads format 1\); upgrade"
    ):
        Registry(str(tmp_path), "m").register({"model.safetensors": b"x"}, FACTS, "")


def test_a_gap_of_several_events_is_noticed(tmp_path: Path) -> None:
    registry = registry_with(tmp_path, 8)
    for number in (4, 5):
        Path(registry.log.location(number)).unlink()
    with pytest.raises(RegistryError, match="000000000004.json is missing from the log"):
        Registry(str(tmp_path), "m").register({"w": b"new"}, FACTS, "")


def test_a_retired_version_is_not_what_registering_again_gives(tmp_path: Path) -> None:
    registry = registry_with(tmp_path, 2)
    registry.retire(2, "by mistake")
    files = {"model.safetensors": b"w1", "config.json": b"{}"}
    assert registry.register(files, FACTS, "again").version == 3
    assert registry.register(files, FACTS, "and again").version == 3
