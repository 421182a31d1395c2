"""WebDataset tars that others wrote: packed again, or made a data set as they are by indexing them.

The image of a sample is its only member that is one (``jpg``, ``input.jpg``), or the one that ``source.image_member``
names. Its label is ``cls`` (or ``target.cls``, if it is the only one), or ``label`` of its ``json``, or what
``source.label_column`` names. Tars with names of splits, or in folders with such names, are these splits
(`tarflow_scale.shards.sources.splits`).
"""

import re
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from tarflow_scale import storage
from tarflow_scale.config.prepare import SourceConfig, SplitConfig
from tarflow_scale.errors import DataError
from tarflow_scale.runtime import console
from tarflow_scale.shards.images import IMAGE_EXTENSIONS, Reading, image_extension, image_size
from tarflow_scale.shards.index import ShardIndex, checksum
from tarflow_scale.shards.manifest import ShardRecord
from tarflow_scale.shards.reader import members_of
from tarflow_scale.shards.sources.classes import classes_of_labels, read_label_names
from tarflow_scale.shards.sources.source import BadImage, EncodedSource, Shaping
from tarflow_scale.shards.sources.splits import (
    Group,
    Role,
    Settled,
    counted,
    looks_split,
    role_of,
    roles_of_files,
    settle,
)
from tarflow_scale.shards.sources.tar_files import find_tars, tars_of_folder
from tarflow_scale.shards.sources.tar_rules import Rules
from tarflow_scale.shards.sources.tar_scan import ScannedTar, scan_tar
from tarflow_scale.shards.workers import in_workers

__all__ = ["IndexedTars", "TarSource", "index_tars"]

T = TypeVar("T")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.tar")
"""What a manifest takes as the name of a shard."""


class TarSource(EncodedSource):
    """Images of foreign WebDataset tars, to be packed again.

    It holds about a hundred bytes for each image. Its digest is that of the digests of all tars, in their order.

    Args:
        config: path, and what of a sample is the image and the label.
        split: which tars are which split.
        shaping: what is done to sizes.
        num_workers: processes that scan the tars.

    Raises:
        DataError: no tars, a damaged one, or labels for some samples only.
    """

    def __init__(self, config: SourceConfig, split: SplitConfig, shaping: Shaping, num_workers: int = 1) -> None:
        found = find_tars(config.path or "")
        self._root = found.root
        self.is_remote = storage.is_remote(found.root)
        roles = roles_of_files(found.names, split, "tars")
        skipped = [name for name, role in zip(found.names, roles, strict=True) if role == "ignore"]
        used = [(name, role) for name, role in zip(found.names, roles, strict=True) if role != "ignore"]
        if not used:
            raise DataError(f"split.ignore must leave some tars of {config.path} (got all {len(skipped)}); narrow it")
        scan = partial(scan_tar, root=found.root, rules=Rules.of(config))
        scanned = _of_each(scan, [name for name, _ in used], "scan", num_workers)
        _check_images(scanned, config)
        settled, tars = _settled([(tar, role) for tar, (_, role) in zip(scanned, used, strict=True)], split)
        class_names, labels = _classes([tar for tar, _ in tars], config)
        self._set_places([tar for tar, _ in tars])
        self.ignored = sum((tar.ignored for tar in scanned), found.ignored)
        if split.by_name:
            _check_folders(scanned, [role for _, role in used], config)
        self.lines = (*found.lines, *settled.lines, *_left_out(scanned, skipped), *_unlabelled(scanned, class_names))
        is_file = len(found.names) == 1 and found.root != config.path
        name = storage.base_name(found.names[0] if is_file else found.root)
        super().__init__(
            shaping,
            name=name.removesuffix(".tar"),
            description="WebDataset tars" + (f", {settled.words}" if settled.words else ""),
            class_names=class_names,
            labels=labels,
            digest=storage.digest(f"{[(tar.name, tar.sha256) for tar, _ in tars]} {class_names}".encode()),
            official=settled.codes([role for tar, role in tars for _ in range(len(tar)) if role is not None]),
        )

    def encoded(self, number: int) -> bytes:
        """The image member."""
        start, size = self._images[number].tolist()
        content = storage.read_range(storage.join(self._root, self._tar_of(number)), start, start + size)
        if len(content) < size:
            raise BadImage(f"{self.place(number)} ends early ({len(content)} of {size} bytes); replace the tar")
        return content

    def origin(self, number: int) -> str:
        """Tar and key."""
        key = self._keys[self._key_ends[number] : self._key_ends[number + 1]]
        return f"{self._tar_of(number)}:{key.decode(errors='surrogateescape')}"

    def place(self, number: int) -> str:
        """Where the tar is, and the key."""
        return f"{self._root.rstrip('/')}/{self.origin(number)}"

    def _tar_of(self, number: int) -> str:
        return self._names[int(np.searchsorted(self._ends, number, side="right"))]

    def _set_places(self, tars: Sequence[ScannedTar]) -> None:
        """Where images are, in arrays: objects for every sample would cost a worker gigabytes."""
        self._names = [tar.name for tar in tars]
        self._ends = np.cumsum([len(tar) for tar in tars])
        self._images = np.concatenate([tar.places[:, 2:] for tar in tars])
        keys = [key.encode(errors="surrogateescape") for tar in tars for key in tar.keys]
        self._keys = b"".join(keys)
        self._key_ends = np.cumsum([0, *map(len, keys)], dtype=np.int64)


def _of_each(function: Callable[[str], T], names: Sequence[str], verb: str, num_workers: int) -> list[T]:
    found: list[T] = []
    with console.progress_bar(len(names), verb, unit="tars") as bar:
        for one in in_workers(function, names, num_workers):
            found.append(one)
            bar.update(1)
    return found


def _check_images(tars: Sequence[ScannedTar], config: SourceConfig) -> None:
    if not any(map(len, tars)):
        raise DataError(
            f"no sample of {config.path} has an image (for one, {tars[0].without.example or tars[0].name}); check "
            f"source.path and source.image_member"
        )
    if config.label_column is not None and all(label is None for tar in tars for label in tar.labels):
        found = list(dict.fromkeys(extension for tar in tars for extension in tar.extensions))
        raise DataError(
            f"source.label_column must name a member or a field of the json (got {config.label_column!r}, which holds "
            f"no label in {config.path}; members: {', '.join(found[:10])}); correct it"
        )


def _settled(
    tars: list[tuple[ScannedTar, Role | None]], split: SplitConfig
) -> tuple[Settled, list[tuple[ScannedTar, Role | None]]]:
    """What is packed of the splits that were found, and its tars."""
    groups: dict[Role, Group] = {}
    for tar, role in tars:
        if role is not None and len(tar):
            group = groups.setdefault(role, Group())
            group.names.append(tar.name)
            group.num_images += len(tar)
            group.labelled = group.labelled or any(label is not None for label in tar.labels)
    for role in groups or (None,):
        _check_all_labelled([tar for tar, its_role in tars if its_role == role])
    settled = settle(groups, split)
    return settled, [(tar, role) for tar, role in tars if len(tar) and (not groups or role in settled.packed)]


def _folders(tar: ScannedTar) -> set[str]:
    return {key.rpartition("/")[0] for key in tar.keys}


def _check_folders(tars: Sequence[ScannedTar], roles: Sequence[Role | None], config: SourceConfig) -> None:
    """See that folders within tars are no splits, of which a tar is one as a whole.

    Raises:
        DataError: they are.
    """
    found: dict[Role | None, str] = {}
    for tar, role in zip(tars, roles, strict=True):
        within = {}
        for folder in sorted(_folders(tar)):
            part = next((part for part in folder.split("/") if looks_split(part)), None)
            within[role if part is None else role_of(part)] = f"{tar.name}:{folder}"
        found = within if role is not None else found | within
        if len(found) > 1:
            raise DataError(
                f"folders in tars must not be splits (got {' and '.join(sorted(found.values())[-2:])} of "
                f"{config.path}); unpack the tars and set source.kind=folder, or set split.by_name=false to pool them"
            )


def _check_all_labelled(tars: Sequence[ScannedTar]) -> None:
    """See that all samples of a split have labels, or none.

    Raises:
        DataError: some have.
    """
    labels = {label for tar in tars for label in tar.labels}
    if None not in labels or len(labels) == 1:
        return
    tar = next(tar for tar in tars if None in tar.labels)
    key = tar.keys[int(np.flatnonzero(tar.codes == tar.labels.index(None))[0])]
    raise DataError(
        f"all samples must have labels, or none (got none for {tar.name}:{key}); label or remove it, or leave its tar "
        f"out with split.ignore"
    )


def _classes(tars: Sequence[ScannedTar], config: SourceConfig) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Class names and labels of all samples; no names and zeros without labels."""
    labels = [tar.labels[code] for tar in tars for code in tar.codes.tolist()]
    given = [label for label in labels if label is not None]
    if not given and config.label_names is not None:
        raise DataError(f"source.label_names needs labels (got none in {config.path}); set source.label_column")
    if not given:
        return (), np.zeros(len(labels), dtype=np.int64)
    return classes_of_labels(given, read_label_names(config.label_names), config.path or "")


def _left_out(tars: Sequence[ScannedTar], skipped: Sequence[str]) -> list[str]:
    """Lines about what is in a source and not packed, whatever its split."""
    lines: list[str] = []
    if skipped:
        lines.append(f"left out: {Group(list(skipped)).words} (split.ignore)")
    number = sum(tar.without.number for tar in tars)
    if number:
        example = next(tar.without.example for tar in tars if tar.without.number)
        lines.append(f"warning: left out: {counted(number, 'sample')} without an image, for one, {example}")
    return lines


def _unlabelled(tars: Sequence[ScannedTar], class_names: tuple[str, ...]) -> list[str]:
    """A line about what may hold labels, where none were found."""
    found = dict.fromkeys(extension for tar in tars for extension in tar.extensions)
    others = [one for one in found if one != "cls" and one.rpartition(".")[2] not in IMAGE_EXTENSIONS]
    if class_names:
        return []
    if others:
        return [f"no labels (other members: {', '.join(others[:10])}); name what holds them with source.label_column"]
    folders = sorted({one for tar in tars for one in _folders(tar) if not looks_split(one.rpartition("/")[2])})
    if len(folders) < 2:
        return ["no labels (the tars hold images alone)"]
    return [
        f"warning: no labels: folders in tars are no classes (got {', '.join(folders[-2:])}); unpack the tars and set "
        f"source.kind=folder if they are"
    ]


@dataclass(frozen=True)
class IndexedTars:
    """What indexing found.

    Args:
        records: of the tars.
        indexes: bytes of their indexes.
        size_pixels: side of the images.
        num_channels: of the images.
        class_names: empty without labels.
        ignored: members that belong to no sample, by kind.
    """

    records: tuple[ShardRecord, ...]
    indexes: tuple[bytes, ...]
    size_pixels: int
    num_channels: int
    class_names: tuple[str, ...]
    ignored: Counter[str]


@dataclass(frozen=True)
class _IndexedTar:
    scanned: ScannedTar
    record: ShardRecord
    index: bytes
    shapes: dict[tuple[int, int, int], str]


def index_tars(config: SourceConfig, reading: Reading, num_workers: int = 1) -> IndexedTars:
    """Index the tars of a folder where they lie; a worker holds one sample at a time, and nothing is written.

    Raises:
        DataError: tars that cannot be a data set as they are: damaged, of several splits, of other sizes or channels,
            or with images or labels that training would not find.
    """
    path = config.path or ""
    if storage.exists(path) and not storage.is_folder(path):
        raise DataError(f"source.in_place needs a folder of tars (got {path}); give the folder")
    found = tars_of_folder(path)
    names = found.names
    _check_names(names, path)
    index = partial(_index_tar, root=path, rules=Rules.of(config), reading=reading)
    tars = _of_each(index, names, "index", num_workers)
    scanned = [tar.scanned for tar in tars]
    _check_all_labelled(scanned)
    class_names, _ = _classes(scanned, config)
    shapes = {shape: what for tar in reversed(tars) for shape, what in tar.shapes.items()}
    sizes = {shape[1:] for shape in shapes}
    if len(sizes) > 1 or any(height != width for height, width in sizes):
        got = ", ".join(f"{h}x{w} for {where}" for (_, h, w), where in list(shapes.items())[:2])
        raise DataError(f"images must be squares of one size (got {got}); leave out source.in_place to pack again")
    return IndexedTars(
        records=tuple(tar.record for tar in tars),
        indexes=tuple(tar.index for tar in tars),
        size_pixels=next(iter(sizes))[0],
        num_channels=max(shape[0] for shape in shapes),
        class_names=class_names,
        ignored=sum((tar.ignored for tar in scanned), found.ignored),
    )


def _check_names(names: Sequence[str], path: str) -> None:
    """See that a manifest can name the tars, and that they are of one split."""
    roles = {role_of(name.removesuffix(".tar")): name for name in reversed(names)}
    if len(roles) > 1:
        found = " and ".join(f"{role or 'no split'} in {name}" for role, name in roles.items())
        raise DataError(
            f"a data set in place has one split (got {found} of {path}); move each split to a folder of its own, or "
            f"leave out source.in_place to pack them again"
        )
    for name in names:
        if not _FILE_NAME.fullmatch(name):
            raise DataError(f"a shard needs a plain name of letters, digits and ._- (got {name!r}); rename it")


def _index_tar(name: str, root: str, rules: Rules, reading: Reading) -> _IndexedTar:
    location = storage.join(root, name)
    scanned = scan_tar(name, root, rules)
    again = "leave out source.in_place to pack them again"
    if scanned.linked:
        raise DataError(f"links cannot be read in place (got one in the sample {scanned.linked} of {root}); {again}")
    if scanned.without.number or not len(scanned):
        raise DataError(f"every sample must have an image ({scanned.without.example}); remove it, or {again}")
    # What lies between two samples, say a folder, belongs to the one before, so that samples stay contiguous.
    offsets = [*scanned.places[:, 0].tolist(), int(scanned.places[-1, 1])]
    sums: list[int] = []
    shapes: dict[tuple[int, int, int], str] = {}
    for number, key in enumerate(scanned.keys):
        part = storage.read_range(location, offsets[number], offsets[number + 1])
        first = int(scanned.places[number, 2]) - offsets[number]
        image = part[first : first + int(scanned.places[number, 3])]
        what = f"{location}:{key}"
        _check_as_read(_members_of(part, what), image, scanned.labels[int(scanned.codes[number])], what)
        sums.append(checksum(part))
        shapes.setdefault(image_size(image, what, reading), what)
    index = ShardIndex(np.array(offsets, np.int64), np.array(sums, np.uint64)).to_bytes()
    record = ShardRecord(
        file=name,
        samples=len(scanned),
        bytes=storage.size_bytes(location),
        sha256=scanned.sha256,
        index_sha256=storage.digest(index),
    )
    return _IndexedTar(scanned, record, index, shapes)


def _members_of(content: bytes, what: str) -> dict[str, bytes]:
    try:
        return members_of(content)
    except (tarfile.TarError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{what} cannot be read in place ({reason}); leave out source.in_place to pack them again"
        ) from error


def _check_as_read(members: dict[str, bytes], image: bytes, label: int | str | None, what: str) -> None:
    """See that training will read from a sample what was found in it.

    Raises:
        DataError: it would take another member for the image, or another label.
    """
    again = "leave out source.in_place to pack them again"
    extension = image_extension(members)
    if extension is None or members[extension] != image:
        raise DataError(
            f"the image of a sample in place must be the member that training reads first (got "
            f"{', '.join(sorted(members))} for {what}, of which it reads {extension or 'none'}); {again}"
        )
    if label is None:
        return
    if "cls" not in members:
        where = "the .json" if "json" in members else "another member"
        raise DataError(f"labels must be in .cls (got one in {where} of {what}); {again}")
    text = members["cls"].strip()
    if not text.isdigit() or int(text) != label:
        raise DataError(f"labels in place must be whole numbers in .cls (got {text[:20]!r} for {what}); {again}")
