"""Reading: every batch is the same for any number of ranks, resuming is exact, and wrong bytes are noticed."""

import io
import shutil
import tarfile
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tarflow_scale import storage
from tarflow_scale.errors import DataError
from tarflow_scale.shards.index import ShardIndex, checksum
from tarflow_scale.shards.manifest import Manifest, ShardRecord, index_name
from tarflow_scale.shards.order import OrderSpec
from tarflow_scale.shards.reader import Batch, ShardSet, SlotReader
from tarflow_scale.shards.writer import publish_manifest


def spec_of(shards: ShardSet, num_slots: int = 24, block: int = 5) -> OrderSpec:
    return OrderSpec(tuple(s.samples for s in shards.manifest.shards), num_slots, block, seed=3)


def take(shards: ShardSet, spec: OrderSpec, ranks: int, images_seen: int, steps: int) -> list[NDArray[np.int64]]:
    """Sample numbers of global batches, put together from all ranks."""
    share = spec.num_slots // ranks
    readers = [SlotReader(shards, spec, range(rank * share, (rank + 1) * share)) for rank in range(ranks)]
    streams = [islice(reader.batches(images_seen), steps) for reader in readers]
    return [np.concatenate([batch.samples for batch in parts]) for parts in zip(*streams, strict=True)]


def test_global_batches_do_not_depend_on_the_number_of_ranks(digits: Path) -> None:
    shards = ShardSet(f"{digits}/test")
    spec = spec_of(shards)
    alone = take(shards, spec, 1, 0, 40)
    for ranks in (2, 3, 8):
        assert all((a == b).all() for a, b in zip(alone, take(shards, spec, ranks, 0, 40), strict=True))


@pytest.mark.parametrize("stop", [1, 7, 14, 15, 33])
def test_resuming_equals_never_stopping(digits: Path, stop: int) -> None:
    shards = ShardSet(f"{digits}/test")
    spec = spec_of(shards)
    whole = take(shards, spec, 1, 0, 45)
    resumed = take(shards, spec, 2, stop * spec.num_slots, 45 - stop)
    assert all((a == b).all() for a, b in zip(whole[stop:], resumed, strict=True))


def test_an_epoch_holds_each_sample_at_most_once(digits: Path) -> None:
    shards = ShardSet(f"{digits}/test")
    spec = spec_of(shards)
    steps = shards.manifest.num_images // spec.num_slots
    seen = np.concatenate(take(shards, spec, 1, 0, steps))
    assert len(set(seen.tolist())) == len(seen) == steps * spec.num_slots


def test_a_block_is_read_once_and_resuming_reads_at_most_one_block_a_slot(
    digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = ShardSet(f"{digits}/train")
    spec = spec_of(shards, num_slots=8, block=16)
    read: list[int] = []
    original = storage.read_range

    def counted(location: str, start: int, stop: int) -> bytes:
        read.append(stop - start)
        return original(location, start, stop)

    monkeypatch.setattr(storage, "read_range", counted)
    steps = shards.manifest.num_images // spec.num_slots
    take(shards, spec, 1, 0, steps)
    assert sum(read) <= sum(int(s.bytes) for s in shards.manifest.shards)
    read.clear()
    take(shards, spec, 1, steps // 2 * spec.num_slots, 1)
    largest = max(int(np.diff(shards._index(i).offsets).max()) for i in range(len(shards.manifest.shards)))
    assert sum(read) <= spec.num_slots * spec.shuffle_block * largest


def test_images_and_labels_are_those_of_the_source(digits: Path) -> None:
    from sklearn.datasets import load_digits

    source = load_digits()
    known = {
        image.astype(np.uint8).tobytes(): int(label) for image, label in zip(source.images, source.target, strict=True)
    }
    shards = ShardSet(f"{digits}/test")
    batch = shards.take(np.arange(shards.manifest.num_images))
    capped = {np.minimum(np.frombuffer(key, np.uint8), 15).tobytes(): label for key, label in known.items()}
    assert batch.images.dtype == np.uint8
    assert all(
        capped[(image // 17).tobytes()] == label for image, label in zip(batch.images, batch.labels, strict=True)
    )


def test_evaluation_reads_everything_in_order(digits: Path) -> None:
    shards = ShardSet(f"{digits}/test")
    num = shards.manifest.num_images
    batches: list[Batch] = list(shards.batches(0, num, 100))
    assert [len(batch.images) for batch in batches] == [100, 100, 100, num - 300]
    assert np.concatenate([batch.samples for batch in batches]).tolist() == list(range(num))


@pytest.fixture
def copy(digits: Path, tmp_path: Path) -> Path:
    shutil.copytree(digits / "test", tmp_path / "test")
    return tmp_path / "test"


def damage(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("offset", [3, 600, 5000, 100_000])
def test_a_flipped_bit_is_found_whatever_it_hits(copy: Path, offset: int) -> None:
    damage(copy / "test-00000.tar", offset)
    shards = ShardSet(str(copy))
    with pytest.raises(DataError, match="does not match its checksum"):
        shards.take(np.arange(200))
    with pytest.raises(DataError, match=r"test-00000.tar does not match its manifest \(sha256 differs\)"):
        ShardSet(str(copy), verify="full")


def test_a_truncated_shard_is_found_when_opening(copy: Path) -> None:
    tar = copy / "test-00001.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    with pytest.raises(DataError, match=r"test-00001.tar does not match its manifest \(got \d+ bytes, not \d+\)"):
        ShardSet(str(copy))


def test_a_missing_shard_a_missing_index_and_a_foreign_index_are_found(copy: Path) -> None:
    index = copy / "test-00001.index.npz"
    kept = index.read_bytes()
    index.write_bytes((copy / "test-00000.index.npz").read_bytes())
    with pytest.raises(DataError, match="test-00001.index.npz does not match its manifest"):
        ShardSet(str(copy)).take(np.array([250]))
    index.unlink()
    with pytest.raises(DataError, match="test-00001.index.npz is missing"):
        ShardSet(str(copy)).take(np.array([250]))
    index.write_bytes(kept)
    (copy / "test-00000.tar").unlink()
    with pytest.raises(DataError, match="test-00000.tar is missing"):
        ShardSet(str(copy))


def test_tars_with_extended_headers_are_read_too(digits: Path, tmp_path: Path) -> None:
    """A foreign tar (pax headers, long names) becomes a data set by indexing it."""
    source = ShardSet(f"{digits}/test")
    originals = source.read_run(0, 0, 3)
    buffer = io.BytesIO()
    offsets = [0]
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for number, sample in enumerate(originals):
            for extension, content in sample.members.items():
                info = tarfile.TarInfo(f"{'deep/' * 30}{number:06d}.{extension}")
                info.size = len(content)
                info.pax_headers = {"comment": "é"}
                tar.addfile(info, io.BytesIO(content))
            offsets.append(tar.offset)
    content = buffer.getvalue()
    sums = [checksum(content[a:b]) for a, b in pairwise(offsets)]
    index = ShardIndex(np.array(offsets, np.int64), np.array(sums, np.uint64)).to_bytes()
    (tmp_path / "foreign.tar").write_bytes(content)
    (tmp_path / index_name("foreign.tar")).write_bytes(index)
    record = ShardRecord(
        file="foreign.tar",
        samples=3,
        bytes=len(content),
        sha256=storage.digest(content),
        index_sha256=storage.digest(index),
    )
    facts = source.manifest.model_dump() | {"shards": (record,)}
    publish_manifest(str(tmp_path), Manifest.model_validate(facts))
    batch = ShardSet(str(tmp_path)).take(np.arange(3))
    assert (batch.images == source.take(np.arange(3)).images).all()
    assert (batch.labels == source.take(np.arange(3)).labels).all()
