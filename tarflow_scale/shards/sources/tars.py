"""WebDataset tars that others wrote, to be packed again.

The image of a sample is its only member that is one (``jpg``, ``input.jpg``), or the one that ``source.image_member``
names. Its label is ``cls`` (or ``target.cls``, if it is the only one), or ``label`` of its ``json``, or what
``source.label_column`` names. Tars with names of splits, or in folders with such names, are these splits
(`tarflow_scale.shards.sources.splits`).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from tarflow_scale import storage
from tarflow_scale.config.prepare import SourceConfig, SplitConfig
from tarflow_scale.errors import DataError
from tarflow_scale.runtime import console
from tarflow_scale.shards.images import IMAGE_EXTENSIONS
from tarflow_scale.shards.sources import splits
from tarflow_scale.shards.sources.classes import classes_of_labels
from tarflow_scale.shards.sources.source import BadImage, EncodedSource
from tarflow_scale.shards.sources.split_choice import Group, SourceFile, settle_files
from tarflow_scale.shards.sources.tar_files import find_tars
from tarflow_scale.shards.sources.tar_rules import Rules
from tarflow_scale.shards.sources.tar_scan import ScannedTar, scan_tar
from tarflow_scale.shards.workers import in_workers

__all__ = ["TarSource", "classes_of_tars", "file_of", "for_each_tar"]

T = TypeVar("T")


class TarSource(EncodedSource):
    """Images of tars of other programs. It holds about a hundred bytes for each.

    Its digest is that of the digests of all tars, in their order.

    Args:
        config: path, and which member of a sample is the image and which the label.
        split: which tars are which split.
        num_workers: processes that scan the tars.

    Raises:
        DataError: no tars, a damaged one, or labels for some samples only.
    """

    def __init__(self, config: SourceConfig, split: SplitConfig, num_workers: int = 1) -> None:
        super().__init__(config)
        source = find_tars(config.path or "")
        self._root = source.root
        self.is_remote = storage.is_remote(source.root)
        roles = splits.roles_of_files(source.names, split, "tars")
        skipped = [name for name, role in zip(source.names, roles, strict=True) if role == "ignore"]
        used = [(name, role) for name, role in zip(source.names, roles, strict=True) if role != "ignore"]
        if not used:
            raise DataError(f"split.ignore must leave some tars of {config.path} (got all {len(skipped)}); narrow it")
        scan = partial(scan_tar, root=source.root, rules=Rules.of(config))
        scanned = for_each_tar(scan, [name for name, _ in used], "scan", num_workers)
        _check_images(scanned, config)
        by_role = [(tar, role) for tar, (_, role) in zip(scanned, used, strict=True) if len(tar)]
        settled = settle_files([file_of(tar, role) for tar, role in by_role], split)
        packed = [(tar, role) for tar, role in by_role if settled.keeps(role)]
        tars = [tar for tar, _ in packed]
        self.class_names, self.labels = classes_of_tars(tars, config)
        self.official = settled.codes([role for tar, role in packed for _ in range(len(tar)) if role is not None])
        self._set_places(tars)
        self.ignored = sum((tar.ignored for tar in scanned), source.ignored)
        if split.by_name:
            _check_folders(scanned, [role for _, role in used], config)
        self.lines = (
            *(*source.lines, *settled.lines),
            *(*_left_out(scanned, skipped), *_unlabelled(scanned, self.class_names)),
        )
        is_file = len(source.names) == 1 and source.root != config.path
        self.name = storage.base_name(source.names[0] if is_file else source.root).removesuffix(".tar")
        self.digest = storage.digest(f"{[(tar.name, tar.sha256) for tar in tars]} {self.class_names}".encode())
        self._describe("WebDataset tars", settled.words)
        self._settle_shape()

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
        """Keep the places of images in arrays; an object for every sample would cost a worker gigabytes."""
        self._names = [tar.name for tar in tars]
        self._ends = np.cumsum([len(tar) for tar in tars])
        self._images = np.concatenate([tar.places[:, 2:] for tar in tars])
        keys = [key.encode(errors="surrogateescape") for tar in tars for key in tar.keys]
        self._keys = b"".join(keys)
        self._key_ends = np.cumsum([0, *map(len, keys)], dtype=np.int64)


def for_each_tar(function: Callable[[str], T], names: Sequence[str], verb: str, num_workers: int) -> list[T]:
    """Results of a function of the names of tars, in order, with a progress bar."""
    results: list[T] = []
    with console.progress_bar(len(names), verb, unit="tars") as bar:
        for result in in_workers(function, names, num_workers):
            results.append(result)
            bar.update(1)
    return results


def _check_images(tars: Sequence[ScannedTar], config: SourceConfig) -> None:
    if not any(map(len, tars)):
        raise DataError(
            f"no sample of {config.path} has an image (for one, {tars[0].without or tars[0].name}); check "
            f"source.path and source.image_member"
        )
    if config.label_column is not None and all(label is None for tar in tars for label in tar.labels):
        members = list(dict.fromkeys(extension for tar in tars for extension in tar.extensions))
        raise DataError(
            f"source.label_column must name a member or a field of the json (got {config.label_column!r}, which holds "
            f"no label in {config.path}; members: {', '.join(members[:10])}); correct it"
        )


def file_of(tar: ScannedTar, role: splits.Role | None) -> SourceFile:
    """A tar as a file of its source, which `settle_files` takes."""
    code = tar.labels.index(None) if None in tar.labels else -1
    unlabelled: list[int] = np.flatnonzero(tar.codes == code).tolist()
    first = f"{tar.name}:{tar.keys[unlabelled[0]]}" if unlabelled else ""
    return SourceFile(tar.name, role, len(tar), len(tar) - len(unlabelled), first)


def _folders(tar: ScannedTar) -> set[str]:
    return {key.rpartition("/")[0] for key in tar.keys}


def _check_folders(tars: Sequence[ScannedTar], roles: Sequence[splits.Role | None], config: SourceConfig) -> None:
    """Check that folders within a tar are no splits, because a tar as a whole belongs to one split.

    Raises:
        DataError: they are.
    """
    parts: dict[splits.Role | None, str] = {}
    for tar, role in zip(tars, roles, strict=True):
        within = {}
        for folder in sorted(_folders(tar)):
            part = next((part for part in folder.split("/") if splits.looks_split(part)), None)
            within[role if part is None else splits.role_of(part)] = f"{tar.name}:{folder}"
        parts = within if role is not None else parts | within
        if len(parts) > 1:
            raise DataError(
                f"folders in tars must not be splits (got {' and '.join(sorted(parts.values())[-2:])} of "
                f"{config.path}); unpack the tars and set source.kind=folder, or set split.by_name=false to pool them"
            )


def classes_of_tars(tars: Sequence[ScannedTar], config: SourceConfig) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Class names and labels of all samples; no names and zeros without labels."""
    labels = [tar.labels[code] for tar in tars for code in tar.codes.tolist()]
    if config.label_names is not None and None in labels:
        raise DataError(f"source.label_names needs labels (got none in {config.path}); set source.label_column")
    return classes_of_labels(labels, config.label_names, config.path or "")


def _left_out(tars: Sequence[ScannedTar], skipped: Sequence[str]) -> list[str]:
    """Lines about tars and samples that are left out."""
    lines: list[str] = []
    if skipped:
        lines.append(f"left out: {Group(list(skipped)).words} (split.ignore)")
    number = sum(tar.num_without for tar in tars)
    if number:
        example = next(tar.without for tar in tars if tar.num_without)
        lines.append(f"warning: left out: {splits.counted(number, 'sample')} without an image, for one, {example}")
    return lines


def _unlabelled(tars: Sequence[ScannedTar], class_names: tuple[str, ...]) -> list[str]:
    """A line about members or folders that may hold labels, if none were found."""
    members = dict.fromkeys(extension for tar in tars for extension in tar.extensions)
    holders = [name for name in members if name != "cls" and name.rpartition(".")[2] not in IMAGE_EXTENSIONS]
    if class_names:
        return []
    if holders:
        return [f"no labels (other members: {', '.join(holders[:10])}); name what holds them with source.label_column"]
    folders = sorted(
        {name for tar in tars for name in _folders(tar) if not splits.looks_split(name.rpartition("/")[2])}
    )
    if len(folders) < 2:
        return ["no labels (the tars hold images alone)"]
    return [
        f"warning: no labels: folders in tars are no classes (got {', '.join(folders[-2:])}); unpack the tars and set "
        f"source.kind=folder if they are"
    ]
