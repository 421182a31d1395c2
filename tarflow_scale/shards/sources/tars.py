"""WebDataset tars that other programs wrote, as a source of images.

The image of a sample is its only member with an image extension (``jpg``, ``input.jpg``), or the member that
``source.image_member`` names. Its label is the member or field that ``source.label_column`` names. Without that
setting, it is the member ``cls``, or else the only member that ends in ``.cls``, or else the field ``label`` of the
``json``. The name of a tar, or of a folder above it, can assign its samples to a split
(`tarflow_scale.shards.sources.splits`).
"""

from collections.abc import Callable, Mapping, Sequence
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
    """The images of WebDataset tars; the source needs about a hundred bytes of memory per image.

    The digest of the source covers the names and SHA-256 of all packed tars, in order, and the class names.

    Args:
        config: the path, and the settings that choose the image and the label of a sample.
        split: the patterns, and whether splits are also recognized by name.
        num_workers: number of processes that scan the tars.

    Raises:
        DataError: there are no tars, a tar is damaged, or only some samples have labels.
    """

    def __init__(self, config: SourceConfig, split: SplitConfig, num_workers: int = 1) -> None:
        super().__init__(config)
        source = find_tars(config.path or "")
        self._root = source.root
        self.is_remote = storage.is_remote(source.root)
        roles, skipped = splits.roles_of_files(source.names, split, "tars", config.path or "")
        scan = partial(scan_tar, root=source.root, rules=Rules.of(config))
        scanned = for_each_tar(scan, list(roles), "scan", num_workers)
        _check_images(scanned, config)
        settled = settle_files([file_of(tar, roles[tar.name]) for tar in scanned], split)
        tars = [tar for tar in scanned if len(tar) and settled.keeps(roles[tar.name])]
        self.class_names, self.labels = classes_of_tars(tars, config)
        self.official = settled.codes([roles[tar.name] for tar in tars for _ in range(len(tar))])
        self._set_places(tars)
        self.ignored = sum((tar.ignored for tar in scanned), source.ignored)
        if split.by_name:
            _check_folders(scanned, roles, config)
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
        """The image member of sample ``number``."""
        start, size = self._images[number].tolist()
        content = storage.read_range(storage.join(self._root, self._tar_of(number)), start, start + size)
        if len(content) < size:
            raise BadImage(f"{self.place(number)} ends early (got {len(content)} of {size} bytes); replace the tar")
        return content

    def origin(self, number: int) -> str:
        """Name of the tar, and key of sample ``number``."""
        key = self._keys[self._key_ends[number] : self._key_ends[number + 1]]
        return f"{self._tar_of(number)}:{key.decode(errors='surrogateescape')}"

    def place(self, number: int) -> str:
        """Path or URL of the tar, and the key."""
        return f"{self._root.rstrip('/')}/{self.origin(number)}"

    def _tar_of(self, number: int) -> str:
        return self._names[int(np.searchsorted(self._ends, number, side="right"))]

    def _set_places(self, tars: Sequence[ScannedTar]) -> None:
        """Keep the positions of images in arrays, because an object per sample would cost each worker gigabytes."""
        self._names = [tar.name for tar in tars]
        self._ends = np.cumsum([len(tar) for tar in tars])
        self._images = np.concatenate([tar.places[:, 2:] for tar in tars])
        keys = [key.encode(errors="surrogateescape") for tar in tars for key in tar.keys]
        self._keys = b"".join(keys)
        self._key_ends = np.cumsum([0, *map(len, keys)], dtype=np.int64)


def for_each_tar(function: Callable[[str], T], names: Sequence[str], verb: str, num_workers: int) -> list[T]:
    """Apply a function to the names of tars, with a progress bar; results are in the order of the names."""
    results: list[T] = []
    with console.ProgressBar(len(names), verb, unit="tars") as bar:
        for result in in_workers(function, names, num_workers):
            results.append(result)
            bar.update(1)
    return results


def _check_images(tars: Sequence[ScannedTar], config: SourceConfig) -> None:
    if not any(map(len, tars)):
        raise DataError(
            f"no sample of {config.path} has an image (for example, {tars[0].without or tars[0].name}); check "
            f"source.path and source.image_member"
        )
    if config.label_column is not None and all(label is None for tar in tars for label in tar.labels):
        members = list(dict.fromkeys(extension for tar in tars for extension in tar.extensions))
        raise DataError(
            f"source.label_column must name a member or a field of the json (got {config.label_column!r}, which holds "
            f"no label in {config.path}; members: {', '.join(members[:10])}); correct it"
        )


def file_of(tar: ScannedTar, role: splits.Role | None) -> SourceFile:
    """Describe a scanned tar for `settle_files`."""
    code = tar.labels.index(None) if None in tar.labels else -1
    unlabelled: list[int] = np.flatnonzero(tar.codes == code).tolist()
    first = f"{tar.name}:{tar.keys[unlabelled[0]]}" if unlabelled else ""
    return SourceFile(tar.name, role, len(tar), len(tar) - len(unlabelled), first)


def _folders(tar: ScannedTar) -> set[str]:
    return {key.rpartition("/")[0] for key in tar.keys}


def _check_folders(tars: Sequence[ScannedTar], roles: Mapping[str, splits.Role | None], config: SourceConfig) -> None:
    """Refuse tars that contain folders of several splits, because all samples of a tar must belong to one split.

    Raises:
        DataError: folders are named after different splits, or after another split than their tar; or only some of
            the folders are named after a split.
    """
    examples: dict[splits.Role | None, str] = {}
    for tar in tars:
        role, within = roles[tar.name], {}
        for folder in sorted(_folders(tar)):
            part = next((part for part in folder.split("/") if splits.looks_split(part)), None)
            within[role if part is None else splits.role_of(part)] = f"{tar.name}:{folder}"
        examples = within if role is not None else examples | within
        if len(examples) > 1:
            raise DataError(
                f"folders in tars must not be splits (got {' and '.join(sorted(examples.values())[-2:])} of "
                f"{config.path}); unpack the tars and set source.kind=folder, or set split.by_name=false to pool them"
            )


def classes_of_tars(tars: Sequence[ScannedTar], config: SourceConfig) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Class names, and the class number of each sample. Without labels, there are no names and all numbers are 0."""
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
        lines.append(f"warning: left out: {splits.counted(number, 'sample')} without an image, for example, {example}")
    return lines


def _unlabelled(tars: Sequence[ScannedTar], class_names: tuple[str, ...]) -> list[str]:
    """If no labels were found, a line about members or folders that may be labels."""
    if class_names:
        return []
    extensions = dict.fromkeys(extension for tar in tars for extension in tar.extensions)
    candidates = [name for name in extensions if name != "cls" and name.rpartition(".")[2] not in IMAGE_EXTENSIONS]
    if candidates:
        shown = ", ".join(candidates[:10])
        return [f"no labels (other members: {shown}); set source.label_column to the member that holds the label"]
    folders = {name for tar in tars for name in _folders(tar) if not splits.looks_split(name.rpartition("/")[2])}
    if len(folders) < 2:
        return ["no labels (the tars hold only images)"]
    return [
        f"warning: no labels: folders in tars are not classes (got {', '.join(sorted(folders)[-2:])}); if they should "
        f"be classes, unpack the tars and set source.kind=folder"
    ]
