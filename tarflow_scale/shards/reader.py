"""Read a data set: read ranges of shards, verify the checksum of every sample, and decode events and labels.

In evaluation, a corrupt sample is an error. Training replaces corrupt samples (`tarflow_scale.shards.loader`).
"""

import contextlib
import io
import json
import struct
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from tarflow_scale import storage
from tarflow_scale.errors import DataError, StorageError
from tarflow_scale.records import LatentFacts
from tarflow_scale.shards.headers import UnusualHeader, members_by_tarfile, plain_members
from tarflow_scale.shards.index import ShardIndex, checksum, read_index
from tarflow_scale.shards.manifest import AS_FOUND, Manifest, ShardRecord, index_name, read_manifest

__all__ = ["FIRST_WAIT_SECONDS", "Batch", "CorruptSample", "ShardSet", "StoredSample", "members_of"]

T = TypeVar("T")

_TAR_BLOCK = 512
_header = struct.Struct("100s 24x 12s 20x c").unpack_from
"""Reads the name, the size in octal digits, and the type from a tar header."""
_REGULAR = (b"0", b"\0")
_RETRIES = 5
_RUN = 256
"""Number of samples per range read when all samples are read."""
_ORIGIN_CHARACTERS = 300
FIRST_WAIT_SECONDS = 0.5
"""Wait before the first retry; each later wait is twice as long. So a shard may be unreachable for 15 seconds, which is
longer than the fail-over of most stores."""


class CorruptSample(DataError):
    """A sample is damaged, or its event or label cannot be decoded.

    Args:
        sample: the sample.
        reason: the fault, in words that complete "sample 7 of train-00001.tar ...".
    """

    def __init__(self, sample: "StoredSample", reason: str) -> None:
        super().__init__(f"{sample.origin} {reason}; restore the shard or pack the data set again")
        self.sample = sample
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return CorruptSample, (self.sample._replace(content=bytes(self.sample.content)), self.reason)


@dataclass(frozen=True)
class Batch:
    """Samples that are processed together.

    Args:
        events: images ``(B, C, H, W)`` uint8 (in any memory order), vectors ``(B, D)`` float32, or moments of latents
            ``(B, n C, h, w)`` float32.
        labels: labels, ``(B,)`` int64; -1 if there are no labels.
        samples: numbers of the samples in the manifest's order, ``(B,)`` int64.
        epochs: training epochs of the samples, ``(B,)`` int64; 0 in evaluation.
        num_replaced: number of samples that replace corrupt samples.
        conditions: condition values of vectors, ``(B, K)`` float32; None if there are none.
        latents: the latents whose moments ``events`` holds; None for images and vectors.
    """

    events: NDArray[Any]
    labels: NDArray[np.int64]
    samples: NDArray[np.int64]
    epochs: NDArray[np.int64]
    num_replaced: int = 0
    conditions: NDArray[np.float32] | None = None
    latents: LatentFacts | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, part: slice) -> "Batch":
        given = None if self.conditions is None else self.conditions[part]
        rows = self.events[part], self.labels[part], self.samples[part], self.epochs[part]
        return Batch(*rows, conditions=given, latents=self.latents)


class StoredSample(NamedTuple):
    """A sample before decoding: its bytes in the tar, and its position.

    Args:
        content: bytes with tar headers and padding; too short if the tar ends early.
        checksum: expected checksum, from the index.
        number: number of the sample in the manifest's order.
        place: number of the sample in its shard.
        file: name of the shard.
        path: folder or URL of the data set.
    """

    content: memoryview | bytes
    checksum: int
    number: int
    place: int
    file: str
    path: str

    @property
    def origin(self) -> str:
        """Text that names the sample, for messages."""
        return f"sample {self.place} of {self.file} in {self.path}"

    @property
    def key(self) -> str:
        """WebDataset's key: the path up to the first dot of the base name; bytes that are not UTF-8 are replaced."""
        name = bytes(self.content[:100]).split(b"\0", 1)[0].decode(errors="replace")
        if bytes(self.content[156:157]) not in _REGULAR:
            with contextlib.suppress(tarfile.TarError, ValueError, OSError):
                name = next((member.name for member in members_by_tarfile(_stream(self.content))), name)
        folder, slash, base = name.rpartition("/")
        return f"{folder}{slash}{base.partition('.')[0]}"

    def members(self) -> dict[str, bytes]:
        """Contents of the members, by extension.

        Raises:
            CorruptSample: the checksum differs, or the bytes are not tar members.
        """
        if checksum(self.content) != self.checksum:
            raise CorruptSample(self, "does not match its checksum")
        try:
            return members_of(self.content)
        except (tarfile.TarError, ValueError, KeyError) as error:
            raise CorruptSample(self, f"is not a sequence of tar members ({' '.join(str(error).split())})") from error


class ShardSet:
    """A data set that is open for reading.

    Args:
        path: folder or URL with a manifest.
        verify: ``size`` compares the sizes of shards with the manifest; ``full`` also compares all SHA-256 digests.

    Raises:
        DataError: there is no manifest, or a shard or its index is missing or does not match the manifest.
    """

    def __init__(self, path: str, verify: str = "size") -> None:
        self.path = path
        self.manifest: Manifest = read_manifest(path)
        self._first = np.concatenate([[0], np.cumsum([shard.samples for shard in self.manifest.shards])])
        self._indexes: dict[int, ShardIndex] = {}
        self._event, self._num_classes = self.manifest.event, self.manifest.num_classes
        self._reading = self.manifest.reading if self.manifest.codec == AS_FOUND else None  # what we wrote is plain
        sizes = storage.list_sizes(path)
        for shard in self.manifest.shards:
            self._check_shard(shard, sizes, full=verify == "full")

    def read_run(self, shard: int, start: int, stop: int) -> list[StoredSample]:
        """Read samples ``[start, stop)`` of a shard as one range; checksums are verified when the samples are decoded.

        Raises:
            DataError: the shard cannot be read, after several retries.
        """
        record = self.manifest.shards[shard]
        index = self._index(shard)
        offsets: list[int] = index.offsets[start : stop + 1].tolist()
        checksums: list[int] = index.checksums[start:stop].tolist()
        base, first, file, path = offsets[0], int(self._first[shard]), record.file, self.path
        location = storage.join(path, file)
        content = memoryview(_patiently(lambda: storage.read_range(location, base, offsets[-1])))
        return [
            StoredSample(content[low - base : high - base], known, first + place, place, file, path)
            for place, low, high, known in zip(range(start, stop), offsets[:-1], offsets[1:], checksums, strict=True)
        ]

    def read(self, samples: NDArray[np.int64]) -> list[StoredSample]:
        """Read samples by number (numbers follow the manifest's order); consecutive samples are read as one range."""
        shards = np.searchsorted(self._first, samples, side="right") - 1
        places = samples - self._first[shards]
        breaks = np.flatnonzero((np.diff(shards) != 0) | (np.diff(places) != 1)) + 1
        stored: list[StoredSample] = []
        for low, high in zip([0, *breaks], [*breaks, len(shards)], strict=True):
            first = int(places[low])
            stored.extend(self.read_run(int(shards[low]), first, first + int(high - low)))
        return stored

    def stored(self) -> Iterator[StoredSample]:
        """Yield all samples in the manifest's order; a few hundred are in memory at a time."""
        for shard, record in enumerate(self.manifest.shards):
            for start in range(0, record.samples, _RUN):
                yield from self.read_run(shard, start, min(start + _RUN, record.samples))

    def decode(self, stored: StoredSample) -> tuple[NDArray[np.uint8], int]:
        """Decode a sample to a uint8 array ``(C, H, W)`` (see `EventType.decode`) and a label (-1 if there is none).

        Raises:
            CorruptSample: the sample is damaged, or does not match the manifest.
        """
        members = self._members(stored)
        try:
            carried = self._event.decode(members, self._reading)
        except DataError as error:
            raise CorruptSample(stored, f"is unusable: {str(error).partition(';')[0]}") from error
        return carried, self._label(stored, members)

    def label(self, stored: StoredSample) -> int:
        """Decode only the label; -1 if there are no labels.

        Raises:
            CorruptSample: the sample is damaged, or has no valid label.
        """
        return self._label(stored, self._members(stored))

    def take(self, samples: NDArray[np.int64]) -> Batch:
        """Read and decode samples by number (numbers follow the manifest's order).

        Raises:
            DataError: a sample is corrupt.
        """
        return self.decoded(self.read(samples))

    def decoded(self, stored: Sequence[StoredSample]) -> Batch:
        """Decode samples to a batch.

        Raises:
            DataError: a sample is corrupt.
        """
        decoded = [self.decode(sample) for sample in stored]
        events, conditions = self._event.unpack(np.ascontiguousarray(np.stack([carried for carried, _ in decoded])))
        return Batch(
            events=events,
            labels=np.array([label for _, label in decoded], dtype=np.int64),
            samples=np.array([sample.number for sample in stored], dtype=np.int64),
            epochs=np.zeros(len(decoded), dtype=np.int64),
            conditions=conditions,
            latents=self.manifest.latents,
        )

    def origin_of(self, stored: StoredSample) -> str:
        """The name of the image at its source, as recorded by `prepare`; the key if no name is recorded.

        Raises:
            DataError: the sample is corrupt.
        """
        try:
            record = json.loads(self._members(stored).get("json", b"{}"))
        except ValueError:
            record = {}
        origin = record.get("origin") if isinstance(record, dict) else None
        return origin[:_ORIGIN_CHARACTERS] if isinstance(origin, str) else stored.key

    def batches(self, start: int, stop: int, batch_size: int) -> Iterator[Batch]:
        """Yield samples ``[start, stop)`` in the manifest's order, for evaluation; the last batch may be smaller."""
        for low in range(start, stop, batch_size):
            yield self.take(np.arange(low, min(low + batch_size, stop)))

    def _members(self, stored: StoredSample) -> dict[str, bytes]:
        """Members of a sample. A corrupt sample is read once more, because the transfer may have damaged it."""
        try:
            return stored.members()
        except CorruptSample:
            (again,) = self.read(np.array([stored.number]))
            return again.members()

    def _label(self, stored: StoredSample, members: dict[str, bytes]) -> int:
        if not self._num_classes:
            return -1
        text = members.get("cls", b"").strip()
        if not text.isdigit() or (label := int(text)) >= self._num_classes:
            raise CorruptSample(
                stored, f"must have a label from 0 to {self._num_classes - 1} in .cls (got {text[:20]!r})"
            )
        return label

    def _index(self, shard: int) -> ShardIndex:
        if shard not in self._indexes:
            record = self.manifest.shards[shard]
            location = storage.join(self.path, index_name(record.file))
            self._indexes[shard] = _patiently(
                lambda: read_index(location, record.samples, record.index_sha256, record.bytes)
            )
        return self._indexes[shard]

    def _check_shard(self, record: ShardRecord, sizes: dict[str, int], full: bool) -> None:
        for name in (record.file, index_name(record.file)):
            if name not in sizes:
                raise DataError(
                    f"{storage.join(self.path, name)} is missing, though the manifest names it; restore it or pack the "
                    f"data set again"
                )
        location, size = storage.join(self.path, record.file), sizes[record.file]
        if size != record.bytes:
            raise DataError(
                f"{location} does not match its manifest (got {size} bytes, not {record.bytes}); pack the data set "
                f"again"
            )
        if full:
            self.verify_shard(record)

    def verify_shard(self, record: ShardRecord) -> None:
        """Compare the SHA-256 of a shard and of its index with the manifest.

        Raises:
            DataError: a digest differs.
        """
        index = storage.join(self.path, index_name(record.file))
        read_index(index, record.samples, record.index_sha256, record.bytes)
        location = storage.join(self.path, record.file)
        with storage.local_copy(location) as copy:
            if storage.digest(copy) != record.sha256:
                raise DataError(f"{location} does not match its manifest (sha256 differs); pack the data set again")


def _patiently(read: Callable[[], T]) -> T:
    """Call ``read``, with retries.

    Raises:
        DataError: every attempt failed.
    """
    try:
        return storage.retrying(read, _RETRIES + 1, FIRST_WAIT_SECONDS)
    except StorageError as error:
        raise DataError(f"a shard could not be read during the run, in {_RETRIES + 1} attempts: {error}") from error


def members_of(content: bytes | memoryview) -> dict[str, bytes]:
    """Contents of the tar members of one sample, by extension; if an extension occurs twice, the first member counts.

    Plain headers, such as those of packed shards, are read here; `tarflow_scale.shards.headers` reads all others.
    Because the first member counts, a system file that follows a sample cannot replace a member of the sample.

    Raises:
        TarError, ValueError: the content does not consist of tar members.
    """
    members: dict[str, bytes] = {}
    position = 0
    while position < len(content):
        if len(content) - position < _TAR_BLOCK:
            raise ValueError("it ends inside a header")
        name, octal, kind = _header(content, position)
        if kind not in _REGULAR:
            return _members_with_extended_headers(content)
        size = int(octal.rstrip(b"\0 ") or b"0", 8)
        if size < 0:
            raise ValueError("a member has a negative size")  # it would be read again and again
        start = position + _TAR_BLOCK
        members.setdefault(_extension(name.partition(b"\0")[0].decode()), bytes(content[start : start + size]))
        position = start + -(-size // _TAR_BLOCK) * _TAR_BLOCK
    return members


def _members_with_extended_headers(content: bytes | memoryview) -> dict[str, bytes]:
    try:
        headers = list(plain_members(_stream(content), len(content) + 2 * _TAR_BLOCK))
    except UnusualHeader:
        headers = list(members_by_tarfile(_stream(content)))
    members: dict[str, bytes] = {}
    for header in headers:
        if header.kind == "file":
            members.setdefault(_extension(header.name), bytes(content[header.data : header.data + header.size]))
    return members


def _stream(content: bytes | memoryview) -> io.BytesIO:
    """A complete tar from the bytes of some members."""
    return io.BytesIO(bytes(content) + bytes(2 * _TAR_BLOCK))


def _extension(name: str) -> str:
    """The extension as WebDataset defines it: the text after the first dot of the base name, in lower case."""
    return name[name.rfind("/") + 1 :].partition(".")[2].lower()
