"""Shards to batches: range reads, a checksum at every read, and an order that depends on (seed, epoch) alone."""

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tarflow_scale import storage
from tarflow_scale.errors import DataError
from tarflow_scale.shards.images import decode_image
from tarflow_scale.shards.index import ShardIndex, checksum, read_index
from tarflow_scale.shards.manifest import Manifest, index_name, read_manifest
from tarflow_scale.shards.order import Line, OrderSpec, SlotWalk, steps_per_epoch

__all__ = ["Batch", "ShardSet", "SlotReader"]

_TAR_BLOCK = 512
_REGULAR = (b"0", b"\0")


@dataclass(frozen=True)
class Batch:
    """Samples that are processed together.

    images: ``(B, C, H, W)`` uint8. labels: ``(B,)`` int64, -1 without labels. samples: ``(B,)`` int64, the index of
    each sample in the manifest's order. epoch: of training; 0 in evaluation.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    samples: NDArray[np.int64]
    epoch: int


@dataclass(frozen=True)
class _Stored:
    """A sample as it lies in the tar."""

    members: dict[str, bytes]
    index: int
    origin: str


class ShardSet:
    """A data set that is open for reading.

    Args:
        path: folder or URL with a manifest.
        verify: ``size`` compares the size of every shard with the manifest, ``full`` every sha256.

    Raises:
        DataError: no manifest; a shard missing, or not the one the manifest names.
    """

    def __init__(self, path: str, verify: str = "size") -> None:
        self.path = path
        self.manifest: Manifest = read_manifest(path)
        self._first = np.concatenate([[0], np.cumsum([shard.samples for shard in self.manifest.shards])])
        self._indexes: dict[int, ShardIndex] = {}
        for shard in self.manifest.shards:
            self._check_shard(shard.file, shard.bytes, shard.sha256 if verify == "full" else None)

    def read_run(self, shard: int, start: int, stop: int) -> list[_Stored]:
        """Samples ``[start, stop)`` of a shard, by one range read, each checked against its checksum.

        Raises:
            DataError: when a sample's bytes are not what was packed.
        """
        record = self.manifest.shards[shard]
        index = self._index(shard)
        offsets = index.offsets[start : stop + 1]
        content = storage.read_range(storage.join(self.path, record.file), int(offsets[0]), int(offsets[-1]))
        view = memoryview(content)
        samples: list[_Stored] = []
        for i in range(stop - start):
            sample = view[offsets[i] - offsets[0] : offsets[i + 1] - offsets[0]]
            origin = f"sample {start + i} of {record.file} in {self.path}"
            if checksum(sample) != int(index.checksums[start + i]):
                raise DataError(f"{origin} does not match its checksum; restore the shard or pack the data set again")
            samples.append(_Stored(_members(sample), int(self._first[shard]) + start + i, origin))
        return samples

    def batches(self, start: int, stop: int, batch_size: int) -> Iterator[Batch]:
        """Samples ``[start, stop)`` in the manifest's order; the last batch may be smaller. For evaluation."""
        for low in range(start, stop, batch_size):
            yield self.take(np.arange(low, min(low + batch_size, stop)))

    def take(self, samples: NDArray[np.int64]) -> Batch:
        """Samples by their number in the manifest's order."""
        shards = np.searchsorted(self._first, samples, side="right") - 1
        return self.collate(self.read_scattered(shards, samples - self._first[shards]), epoch=0)

    def read_scattered(self, shards: NDArray[np.int64], indices: NDArray[np.int64]) -> list[_Stored]:
        """Samples given by (shard, index in shard), in the given order; neighbours are read together."""
        breaks = np.flatnonzero((np.diff(shards) != 0) | (np.diff(indices) != 1)) + 1
        samples: list[_Stored] = []
        for low, high in zip([0, *breaks], [*breaks, len(shards)], strict=True):
            first = int(indices[low])
            samples.extend(self.read_run(int(shards[low]), first, first + int(high - low)))
        return samples

    def collate(self, stored: list[_Stored], epoch: int) -> Batch:
        """Decode samples and stack them."""
        shape = self.manifest.event_shape
        images = np.empty((len(stored), *shape), dtype=np.uint8)
        for i, sample in enumerate(stored):
            image = decode_image(_required(sample, "png"), sample.origin)
            if image.shape != shape:
                raise DataError(f"{sample.origin} has shape {image.shape} (the manifest says {shape}); pack again")
            images[i] = image
        labelled = self.manifest.num_classes > 0
        labels = [int(_required(sample, "cls")) if labelled else -1 for sample in stored]
        order = [sample.index for sample in stored]
        return Batch(images, np.array(labels, dtype=np.int64), np.array(order, dtype=np.int64), epoch)

    def _index(self, shard: int) -> ShardIndex:
        if shard not in self._indexes:
            record = self.manifest.shards[shard]
            location = storage.join(self.path, index_name(record.file))
            self._indexes[shard] = read_index(location, record.samples, record.index_sha256)
        return self._indexes[shard]

    def _check_shard(self, file: str, size: int, sha256: str | None) -> None:
        location = storage.join(self.path, file)
        if not storage.exists(location):
            raise DataError(
                f"{location} is missing, though the manifest names it; restore it or pack the data set again"
            )
        found = storage.size_bytes(location)
        if found != size:
            raise DataError(
                f"{location} does not match its manifest (got {found} bytes, not {size}); pack the data again"
            )
        if sha256 is not None:
            with storage.local_copy(location) as copy:
                if storage.digest(copy) != sha256:
                    raise DataError(f"{location} does not match its manifest (sha256 differs); pack the data set again")


class SlotReader:
    """The batches of one rank: slots ``[first_slot, first_slot + num_slots)`` of every global batch.

    Args:
        shards: the data set.
        spec: the order of samples.
        slots: this rank's slots.
    """

    def __init__(self, shards: ShardSet, spec: OrderSpec, slots: range) -> None:
        self._shards = shards
        self._spec = spec
        self._slots = slots

    def batches(self, images_seen: int) -> Iterator[Batch]:
        """Batches for ever, from the global batch that follows ``images_seen`` images.

        Resuming reads at most one block per slot again. Each batch holds ``len(slots)`` samples.
        """
        step = images_seen // self._spec.num_slots
        while True:
            epoch, start = divmod(step, steps_per_epoch(self._spec))
            for batch in self._epoch(epoch, start):
                yield batch
                step += 1

    def _epoch(self, epoch: int, start: int) -> Iterator[Batch]:
        line = Line(self._spec, epoch)
        walks = [SlotWalk(self._spec, epoch, slot) for slot in self._slots]
        streams = [self._stream(line, walk, start) for walk in walks]
        for stored in zip(*streams, strict=True):
            yield self._shards.collate(list(stored), epoch)

    def _stream(self, line: Line, walk: SlotWalk, start: int) -> Iterator[_Stored]:
        """One slot's samples from step ``start`` to the end of the epoch; holds one block of stored bytes."""
        skip = start - int(walk.visit_starts[walk.block_at(start)])
        for block in range(walk.block_at(start), len(walk.block_lengths)):
            low, high = walk.block_range(block)
            stored = self._shards.read_scattered(*line.locate(np.arange(low, high)))
            for i in walk.block_order(block)[skip:]:
                yield stored[i]
            skip = 0


def _required(sample: _Stored, extension: str) -> bytes:
    try:
        return sample.members[extension]
    except KeyError:
        raise DataError(f"{sample.origin} has no .{extension} member; pack the data set again") from None


def _members(sample: memoryview) -> dict[str, bytes]:
    """Extension to content of the tar members of one sample.

    Plain headers, which is all that our writer makes, are read here; anything else is left to ``tarfile``, ten
    times slower.
    """
    members: dict[str, bytes] = {}
    position = 0
    while position < len(sample):
        header = sample[position : position + _TAR_BLOCK]
        if bytes(header[156:157]) not in _REGULAR:
            return _members_by_tarfile(sample)
        name = bytes(header[:100]).rstrip(b"\0").decode()
        size = int(bytes(header[124:136]).rstrip(b"\0 ") or b"0", 8)
        start = position + _TAR_BLOCK
        members[_extension(name)] = bytes(sample[start : start + size])
        position = start + -(-size // _TAR_BLOCK) * _TAR_BLOCK
    return members


def _members_by_tarfile(sample: memoryview) -> dict[str, bytes]:
    members: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(bytes(sample) + bytes(2 * _TAR_BLOCK)), mode="r:") as tar:
        for member in tar:
            content = tar.extractfile(member)
            if content is not None:
                members[_extension(member.name)] = content.read()
    return members


def _extension(name: str) -> str:
    """WebDataset's rule: everything after the first dot of the base name."""
    return name.rsplit("/", 1)[-1].partition(".")[2]
