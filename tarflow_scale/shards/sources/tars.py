"""WebDataset tars that others wrote: packed again, or made a data set as they are by indexing them.

A sample is a run of members that share a key, the path up to the first dot of the base name. Its image is a member
that ends in png, jpg, jpeg, webp, bmp or npy; its label a ``.cls`` member, or ``label`` in its ``.json``.
"""

import hashlib
import json
import re
import tarfile
from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tarflow_scale import storage, telemetry
from tarflow_scale.errors import DataError
from tarflow_scale.shards.images import image_extension, image_size
from tarflow_scale.shards.index import ShardIndex, checksum
from tarflow_scale.shards.manifest import ShardRecord
from tarflow_scale.shards.reader import check_member, members_of
from tarflow_scale.shards.sources.base import BadImage, EncodedSource, Shaping, as_label, numbered_classes

__all__ = ["TarSource", "index_tars", "scan_tar"]


_TAR_BLOCK = 512
_END_BYTES = 1 << 20
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.tar")
"""What a manifest takes as the name of a shard."""


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
    end = 0
    try:
        with storage.open_seekable(location) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                check_member(member)
                end = member.offset_data + (-(-member.size // _TAR_BLOCK) * _TAR_BLOCK if member.isreg() else 0)
                if not member.isfile():
                    continue
                folder, _, base = member.name.rpartition("/")
                key = f"{folder}/{base.partition('.')[0]}".lstrip("/")
                if samples and samples[-1].key == key:
                    samples[-1] = TarSample(key, samples[-1].start, end)
                else:
                    samples.append(TarSample(key, member.offset, end))
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise DataError(f"{location} is not a whole tar ({error}); replace or remove it") from error
    if not samples:
        raise DataError(f"no samples in {location}; replace or remove it")
    _check_end(location, end)
    double, times = Counter(sample.key for sample in samples).most_common(1)[0]
    if times > 1:
        raise DataError(f"keys of a tar must differ (got {double} twice in {location}); sort its members by key")
    return samples


def _check_end(location: str, end: int) -> None:
    """After its last member a tar has two blocks of zeros or more, and nothing else.

    Otherwise it was cut, or a header is damaged; ``tarfile`` takes either for the end.
    """
    size = storage.size_bytes(location)
    if size < end:
        raise DataError(f"{location} is not a whole tar (it ends inside its last sample); replace or remove it")
    rest = storage.read_range(location, end, min(size, end + _END_BYTES))
    if len(rest) < 2 * _TAR_BLOCK or any(rest):
        raise DataError(
            f"{location} is not a whole tar (no end after byte {end:,} of {size:,}: cut, or a damaged header); replace "
            f"or remove it"
        )


def tar_names(path: str) -> list[str]:
    """Names of the tars in a folder, sorted.

    Raises:
        DataError: there are none.
    """
    names = [name for name in storage.list_names(path) if name.endswith(".tar")]
    if not names:
        raise DataError(f"no .tar in {path}; check source.path")
    return names


def label_of(members: dict[str, bytes], what: str) -> int | None:
    """The label of a sample, None without.

    Raises:
        DataError: what stands for a label is none.
    """
    if "cls" in members:
        return as_label(members["cls"], what)
    try:
        label = json.loads(members["json"]).get("label") if "json" in members else None
    except (ValueError, AttributeError, RecursionError):
        return None
    return None if label is None else as_label(label, what)


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
        self.is_remote = storage.is_remote(path)
        self._samples: list[tuple[str, TarSample]] = []
        labels: list[int | None] = []
        content = hashlib.sha256()
        names = tar_names(path)
        with telemetry.progress_bar(len(names), "scan", unit="tars") as bar:
            for name in names:
                location = storage.join(path, name)
                samples = scan_tar(location)
                # One read of the tar, since its samples lie in a row; packing then reads them in another order.
                with storage.open_seekable(location) as stream:
                    for sample in samples:
                        stream.seek(sample.start)
                        part = stream.read(sample.stop - sample.start)
                        content.update(part)
                        self._samples.append((name, sample))
                        labels.append(label_of(_members_of(part, f"{name}:{sample.key}"), f"{name}:{sample.key}"))
                bar.update(1)
        given = check_labels(labels, [f"{name}:{sample.key}" for name, sample in self._samples])
        super().__init__(
            shaping,
            name=storage.base_name(path),
            description="WebDataset tars",
            class_names=numbered_classes(given) if labels[0] is not None else (),
            labels=given,
            digest=content.hexdigest(),
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
        return _members_of(content, self.place(number))


def _members_of(content: bytes, what: str) -> dict[str, bytes]:
    try:
        return members_of(content)
    except (tarfile.TarError, ValueError, KeyError) as error:
        raise BadImage(f"{what} cannot be read ({' '.join(str(error).split())}); replace the tar") from error


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
        if not _FILE_NAME.fullmatch(name):
            raise DataError(f"a shard needs a plain name of letters, digits and ._- (got {name!r}); rename it")
        samples = scan_tar(location)
        # What lies between two samples, say a folder, belongs to the one before, so that samples stay contiguous.
        offsets = [*(sample.start for sample in samples), samples[-1].stop]
        sums: list[int] = []
        for number, sample in enumerate(samples):
            part = storage.read_range(location, offsets[number], offsets[number + 1])
            sums.append(checksum(part))
            what = f"{location}:{sample.key}"
            members = _members_of(part, what)
            shapes.setdefault(_shape_of(members, what), what)
            labels.append(label_of(members, what))
            if labels[-1] is not None and "cls" not in members:
                raise DataError(f"labels must be in .cls (got one in the .json of {what}); leave out source.in_place")
            names.append(what)
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
