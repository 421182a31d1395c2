"""Vectors as members and as bytes: nothing is lost, and what is damaged is found."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from tarflow_scale.config.prepare import PrepareConfig
from tarflow_scale.errors import DataError
from tarflow_scale.records import VectorFacts
from tarflow_scale.shards.events import VectorEvent
from tarflow_scale.shards.inspection import check, statistics
from tarflow_scale.shards.reader import ShardSet
from tarflow_scale.shards.writer import PackedShard, Sample
from tarflow_scale.verbs.prepare.driver import run as prepare

EVENT = VectorEvent(VectorFacts(num_values=3, num_conditions=2))
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.lists(finite, min_size=5, max_size=5))
def test_numbers_survive_to_the_bit(numbers: list[float]) -> None:
    stored = np.array(numbers, dtype="<f4").view(np.uint8)[None, None]
    assert stored.shape == EVENT.carried_shape
    back = EVENT.decode(EVENT.content(stored), None)
    assert (back == stored).all()
    values, conditions = EVENT.unpack(back[None])
    assert conditions is not None
    assert values.tobytes() + conditions.tobytes() == stored.tobytes()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"npy": npy(np.zeros(3, "<f4"))}, "no .condition.npy"),
        (
            {"npy": npy(np.zeros(4, "<f4")), "condition.npy": npy(np.zeros(2, "<f4"))},
            r"float32 \(3,\) .got float32 \(4,\)",
        ),
        ({"npy": npy(np.zeros(3)), "condition.npy": npy(np.zeros(2, "<f4"))}, "got float64"),
        ({"npy": npy(np.full(3, np.nan, "<f4")), "condition.npy": npy(np.zeros(2, "<f4"))}, "finite"),
        ({"npy": b"\x93NUMPY", "condition.npy": npy(np.zeros(2, "<f4"))}, "cannot be read"),
        ({"npy": npy(np.array([{}], dtype=object)), "condition.npy": npy(np.zeros(2, "<f4"))}, "cannot be read"),
    ],
)
def test_damaged_members_are_refused(members: dict[str, bytes], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        EVENT.decode(members, None)


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    arrays = {"x": rng.standard_normal((30, 3)), "labels": np.arange(30) % 2, "conditions": rng.random((30, 2))}
    np.savez(tmp_path / "points.npz", **arrays)
    config = {
        "source": {"kind": "vectors", "path": str(tmp_path / "points.npz")},
        "shards": {"path": str(tmp_path / "data"), "samples_per_shard": 10},
    }
    prepare(PrepareConfig.model_validate(config), dry_run=False)
    return tmp_path / "data" / "train"


def test_plain_webdataset_reads_vectors(packed: Path) -> None:
    urls = [str(file) for file in sorted(packed.glob("*.tar"))]
    data = webdataset.WebDataset(urls, shardshuffle=False).decode().to_tuple("npy", "condition.npy", "cls")
    found = list(data)
    assert len(found) == 24
    assert {(values.shape, given.shape, values.dtype) for values, given, _ in found} == {((3,), (2,), np.dtype("<f4"))}


def test_a_set_of_vectors_knows_its_shape_and_passes_its_checks(packed: Path) -> None:
    shards = ShardSet(str(packed), "full")
    manifest = shards.manifest
    assert (manifest.event.shape, manifest.event.num_conditions, manifest.num_classes) == ((3,), 2, 2)
    assert check(str(packed)) == 24
    (table,) = statistics(str(packed))  # and no line about a contact sheet
    assert "vectors of 3, given 2 numbers" in table
    assert "condition 1" in table


@pytest.mark.parametrize("length", [80, 85, 86, 87, 90])
def test_long_keys_fit_or_get_long_headers(length: int) -> None:
    members = {"npy": npy(np.zeros(3, "<f4")), "condition.npy": npy(np.zeros(2, "<f4"))}
    content = PackedShard.of("a.tar", [Sample("k" * length, members, None)]).tar
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        assert tar.getnames() == [f"{'k' * length}.{name}" for name in ("condition.npy", "json", "npy")]


def test_manifests_of_images_are_as_they_were(digits: Path) -> None:
    content = (digits / "train" / "manifest.json").read_bytes()
    assert b"vectors" not in content
    assert ShardSet(f"{digits}/train").manifest.to_json() == content
