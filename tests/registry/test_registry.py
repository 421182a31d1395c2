"""The registry: an append-only truth, one winner of every race, and blobs that are what they say."""

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from tarflow_scale.config.sampling import SamplingConfig
from tarflow_scale.errors import RegistryError
from tarflow_scale.records import MetricsReport, MetricValue
from tarflow_scale.registry import Registry
from tarflow_scale.registry.log import Event

FACTS: dict[str, Any] = {
    "pixels": {"bit_depth": 4, "noise": "uniform"},
    "data": {
        "name": "d",
        "split": "train",
        "digest": "0",
        "image_size_pixels": 8,
        "num_channels": 1,
        "class_names": ["a", "b"],
        "num_images": 10,
    },
    "parameters": 3,
    "images_seen": 100,
    "ema_half_life_images": 10,
    "config_digest": "c0",
    "git_commit": "unknown",
    "packages": {},
}


def registry_with(path: Path | str, versions: int) -> Registry:
    registry = Registry(str(path), "m")
    for number in range(versions):
        registry.register({"model.safetensors": f"w{number}".encode(), "config.json": b"{}"}, FACTS, "test")
    return registry


@pytest.mark.parametrize("place", ["local", "memory"])
def test_register_resolve_promote_and_roll_back(tmp_path: Path, place: str) -> None:
    registry = registry_with(tmp_path if place == "local" else f"memory://{tmp_path.name}", 3)
    assert [registry.resolve(reference).version for reference in ("latest", 2, "1")] == [3, 2, 1]
    assert registry.read_files(registry.resolve(2)) == {"model.safetensors": b"w1", "config.json": b"{}"}
    registry.promote("champion", 1, None, {}, "first")
    registry.promote("champion", 3, 1, {}, "better")
    assert registry.resolve("champion").version == 3
    assert registry.rollback("champion", "worse after all") == (3, 1)
    assert registry.resolve("champion").version == 1
    with pytest.raises(RegistryError, match="has no earlier version"):
        registry.rollback("champion", "again")
    kinds = [fact.kind for fact in registry.state().history]
    assert kinds == ["register"] * 3 + ["promote"] * 2 + ["rollback"]
    assert Registry.models(registry.path) == ["m"]


def test_the_same_files_are_one_version(tmp_path: Path) -> None:
    registry = registry_with(tmp_path, 1)
    again = registry.register({"config.json": b"{}", "model.safetensors": b"w0"}, FACTS, "again")
    assert again.version == 1
    other = registry.register(
        {"config.json": b"{}", "model.safetensors": b"w0"}, FACTS | {"config_digest": "c1"}, "new"
    )
    assert other.version == 2


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (7, r"m has no version 7 \(its versions: 1, 2\); check the number"),
        ("champion", r"m has no alias 'champion' \(its aliases: none\); promote a version first"),
    ],
)
def test_what_does_not_exist(tmp_path: Path, reference: int | str, message: str) -> None:
    with pytest.raises(RegistryError, match=message):
        registry_with(tmp_path, 2).resolve(reference)


def test_no_model_and_no_registry(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="no registry at"):
        Registry(str(tmp_path), "m").state()
    registry_with(tmp_path, 1)
    with pytest.raises(RegistryError, match=r"no model 'n' in the registry .* \(its models: m\); check registry.model"):
        Registry(str(tmp_path), "n").state()
    with pytest.raises(RegistryError, match="no registry at"):
        Registry.models(str(tmp_path / "absent"))


def test_an_alias_that_moved_meanwhile_stays(tmp_path: Path) -> None:
    registry = registry_with(tmp_path, 2)
    registry.promote("champion", 1, None, {}, "")
    with pytest.raises(RegistryError, match=r"another process moved .* \(got 1, not None\)"):
        registry.promote("champion", 2, None, {}, "")
    assert registry.resolve("champion").version == 1


def _promote(path: str, version: int) -> bool:
    try:
        Registry(path, "m").promote("champion", version, None, {}, "race")
    except RegistryError:
        return False
    return True


def _register(path: str, number: int) -> int:
    return Registry(path, "m").register({"model.safetensors": f"x{number}".encode()}, FACTS, "race").version


def test_of_racing_writers_one_promotes_and_all_register(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    with context.Pool(6) as pool:
        versions = pool.starmap(_register, [(str(tmp_path), number) for number in range(12)], chunksize=1)
        assert sorted(versions) == list(range(1, 13))
        wins = pool.starmap(_promote, [(str(tmp_path), version) for version in range(1, 7)], chunksize=1)
    assert wins.count(True) == 1
    assert Registry(str(tmp_path), "m").resolve("champion").version == wins.index(True) + 1


def test_a_changed_event_breaks_the_chain(tmp_path: Path) -> None:
    registry_with(tmp_path, 3)
    event = tmp_path / "m/_log/000000000002.json"
    event.write_bytes(event.read_bytes().replace(b'"reason":"test"', b'"reason":"tost"'))
    with pytest.raises(RegistryError, match=r"000000000002.json is damaged \(its checksum differs\)"):
        Registry(str(tmp_path), "m").state()
    event.unlink()
    with pytest.raises(RegistryError, match="000000000002.json is missing from the log"):
        Registry(str(tmp_path), "m").state()


def test_an_event_in_place_of_another_breaks_the_chain(tmp_path: Path) -> None:
    """Sealed like any event, so that only the event after it tells."""
    registry_with(tmp_path, 3)
    file = tmp_path / "m/_log/000000000002.json"
    event = Event.from_json(file.read_bytes(), str(file))
    file.write_bytes(event.model_copy(update={"reason": "another", "checksum": ""}).sealed().to_json())
    with pytest.raises(RegistryError, match="000000000003.json does not follow the previous event of the log"):
        Registry(str(tmp_path), "m").state()


def test_a_damaged_or_missing_blob_is_named(tmp_path: Path) -> None:
    registry = registry_with(tmp_path, 1)
    version = registry.resolve(1)
    blob = tmp_path / "blobs/sha256" / version.files["model.safetensors"].sha256
    blob.write_bytes(b"wX")
    with pytest.raises(RegistryError, match="model.safetensors of m does not match its digest"):
        registry.read_files(version)
    blob.unlink()
    with pytest.raises(RegistryError, match="model.safetensors of m is missing"):
        registry.read_files(version)


def report(version: int, weights: str) -> MetricsReport:
    value = MetricValue(value=1.0, unit="u", num_images=1, protocol="p", protocol_digest="d", protocol_id="i")
    return MetricsReport(
        model="m",
        version=version,
        weights_digest=weights,
        metrics={"p": value},
        baselines={},
        sampling=SamplingConfig(),
        seconds=1,
        packages={},
    )


def test_a_report_belongs_to_its_weights(tmp_path: Path) -> None:
    registry = registry_with(tmp_path, 2)
    registry.attach_report(report(2, registry.resolve(2).weights_digest), "test")
    assert [len(registry.state().reports.get(version, [])) for version in (1, 2)] == [0, 1]
    with pytest.raises(RegistryError, match="must be about the weights of m@1"):
        registry.attach_report(report(1, registry.resolve(2).weights_digest), "test")


def test_events_are_plain_json_with_who_when_why(tmp_path: Path) -> None:
    registry_with(tmp_path, 1)
    event = json.loads((tmp_path / "m/_log/000000000001.json").read_text())
    assert event["reason"] == "test"
    assert "@" in event["actor"]
    assert event["time"].endswith("+00:00")
    assert event["previous"] == ""


def test_an_event_of_another_version_is_one_line(tmp_path: Path) -> None:
    registry = Registry(str(tmp_path), "m")
    registry.append("register", "by a newer program", lambda _: {"version": {"version": 1, "shape": "new"}})
    with pytest.raises(
        RegistryError, match=r"the log of m in .* holds an event that cannot be read \(files: Field req"
    ):
        registry.state()
