"""WebDataset tars that others wrote: packed again, or made a data set as they are by indexing them.

A sample is a run of members that share a key, the path up to the first dot of the base name. Its image is a member
that ends in png, jpg, jpeg, webp, bmp or npy; its label a ``.cls`` member, or ``label`` in its ``.json``.
"""

import json
import tarfile
from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tarflow_scale import storage
from tarflow_scale.errors import DataError
from tarflow_scale.shards.images import image_extension, image_size
from tarflow_scale.shards.index import ShardIndex, checksum
from tarflow_scale.shards.manifest import ShardRecord
from tarflow_scale.shards.reader import members_of
from tarflow_scale.shards.sources.base import BadImage, EncodedSource, Shaping

__all__ = ["TarSource", "index_tars", "scan_tar"]


@dataclass(frozen=True)
class TarSample:
    """Key and byte range ``[start, stop)`` of a sample in its tar."""

    key: str
    start: int
    stop: int


def scan_tar(location: str) -> list[TarSample]:
    """The samples of a tar, in order.

    Raises:
        DataError: it is no whole tar, or a key occurs twice.
    """
    samples: list[TarSample] = []
    try:
        with storage.open_seekable(location) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, base = member.name.rpartition("/")
                key = f"{folder}/{base.partition('.')[0]}".lstrip("/")
                stop = member.offset_data + -(-member.size // 512) * 512
                if samples and samples[-1].key == key:
                    samples[-1] = TarSample(key, samples[-1].start, stop)
                else:
                    samples.append(TarSample(key, member.offset, stop))
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"{location} is not a whole tar ({error}); replace or remove it") from error
    if not samples:
        raise DataError(f"no samples in {location}; replace or remove it")
    if samples[-1].stop > storage.size_bytes(location):
        raise DataError(f"{location} is not a whole tar (it ends inside its last sample); replace or remove it")
    double, times = Counter(sample.key for sample in samples).most_common(1)[0]
    if times > 1:
        raise DataError(f"keys of a tar must differ (got {double} twice in {location}); sort its members by key")
    return samples


def tar_names(path: str) -> list[str]:
    """Names of the tars in a folder, sorted.

    Raises:
        DataError: there are none.
    """
    names = [name for name in storage.list_names(path) if name.endswith(".tar")]
    if not names:
        raise DataError(f"no .tar in {path}; check source.path")
    return names


def label_of(members: dict[str, bytes]) -> int | None:
    """The label of a sample, None without."""
    try:
        if "cls" in members:
            return int(members["cls"])
        label = json.loads(members["json"]).get("label") if "json" in members else None
        return None if label is None else int(label)
    except (ValueError, TypeError, AttributeError):
        return None


class TarSource(EncodedSource):
    """Images of foreign WebDataset tars, to be packed again.

    Args:
        path: folder or URL of the tars.
        shaping: what is done to sizes.

    Raises:
        DataError: no tars, a damaged one, or labels for some samples only.
    """

    def __init__(self, path: str, shaping: Shaping) -> None:
        self._path = path
        self._samples = [(name, sample) for name in tar_names(path) for sample in scan_tar(storage.join(path, name))]
        labels = [label_of(self._members(number)) for number in range(len(self._samples))]
        given = check_labels(labels, [f"{name}:{sample.key}" for name, sample in self._samples])
        sizes = storage.list_sizes(path)
        facts = "\n".join(f"{name} {sizes[name]}" for name in tar_names(path))
        super().__init__(
            shaping,
            name=storage.base_name(path),
            description="WebDataset tars",
            class_names=tuple(str(label) for label in range(int(given.max()) + 1)) if labels[0] is not None else (),
            labels=given,
            digest=storage.digest(f"{facts}\n{given.tolist()}".encode()),
        )

    def encoded(self, number: int) -> bytes:
        """The image member."""
        members = self._members(number)
        extension = image_extension(members)
        if extension is None:
            raise BadImage(f"{self.place(number)} has no image (members: {', '.join(sorted(members))}); remove it")
        return members[extension]

    def origin(self, number: int) -> str:
        """Tar and key."""
        name, sample = self._samples[number]
        return f"{name}:{sample.key}"

    def place(self, number: int) -> str:
        """Where the tar is, and the key."""
        return f"{self._path.rstrip('/')}/{self.origin(number)}"

    def _members(self, number: int) -> dict[str, bytes]:
        name, sample = self._samples[number]
        content = storage.read_range(storage.join(self._path, name), sample.start, sample.stop)
        try:
            return members_of(content)
        except (tarfile.TarError, ValueError) as error:
            raise BadImage(f"{self.place(number)} cannot be read ({error}); replace the tar") from error


def check_labels(labels: list[int | None], names: list[str]) -> NDArray[np.int64]:
    """Labels as an array; zeros where no sample has any.

    Raises:
        DataError: some samples have labels, others none.
    """
    missing = [name for name, label in zip(names, labels, strict=True) if label is None]
    if missing and len(missing) < len(labels):
        raise DataError(f"all samples must have labels, or none (got none for {missing[0]}); label or remove it")
    return np.array([label or 0 for label in labels], dtype=np.int64)


@dataclass(frozen=True)
class IndexedTars:
    """What indexing found: the records of the tars, the side of their images, their channels and their labels."""

    records: tuple[ShardRecord, ...]
    indexes: tuple[bytes, ...]
    size_pixels: int
    num_channels: int
    labels: NDArray[np.int64]
    labelled: bool


def index_tars(path: str) -> IndexedTars:
    """Index tars where they lie; holds one sample at a time and writes nothing.

    Raises:
        DataError: tars that cannot be a data set as they are: damaged, other sizes or channels, labels not in .cls.
    """
    records: list[ShardRecord] = []
    indexes: list[bytes] = []
    labels: list[int | None] = []
    names: list[str] = []
    shapes: dict[tuple[int, int, int], str] = {}
    for name in tar_names(path):
        location = storage.join(path, name)
        samples = scan_tar(location)
        # What lies between two samples, say a folder, belongs to the one before, so that samples stay contiguous.
        offsets = [*(sample.start for sample in samples), samples[-1].stop]
        sums: list[int] = []
        for number, sample in enumerate(samples):
            part = storage.read_range(location, offsets[number], offsets[number + 1])
            sums.append(checksum(part))
            members = members_of(part)
            shapes.setdefault(_shape_of(members, f"{location}:{sample.key}"), f"{location}:{sample.key}")
            labels.append(int(members["cls"]) if members.get("cls", b"").strip().isdigit() else None)
            names.append(f"{location}:{sample.key}")
        index = ShardIndex(np.array(offsets, np.int64), np.array(sums, np.uint64)).to_bytes()
        records.append(
            ShardRecord(
                file=name,
                samples=len(samples),
                bytes=storage.size_bytes(location),
                sha256=_digest_of(location),
                index_sha256=storage.digest(index),
            )
        )
        indexes.append(index)
    given = check_labels(labels, names)
    sizes = {shape[1:] for shape in shapes}
    channels = max(shape[0] for shape in shapes)
    if len(sizes) > 1 or any(height != width for height, width in sizes):
        found = ", ".join(f"{h}x{w} for {where}" for (_, h, w), where in list(shapes.items())[:2])
        raise DataError(f"images must be squares of one size (got {found}); leave out source.in_place to pack again")
    return IndexedTars(
        tuple(records), tuple(indexes), next(iter(sizes))[0], channels, given, labelled=labels[0] is not None
    )


def _digest_of(location: str) -> str:
    with storage.local_copy(location) as copy:
        return storage.digest(copy)


def _shape_of(members: dict[str, bytes], what: str) -> tuple[int, int, int]:
    extension = image_extension(members)
    if extension is None:
        raise DataError(f"{what} has no image (members: {', '.join(sorted(members))}); remove it")
    return image_size(members[extension], what)
