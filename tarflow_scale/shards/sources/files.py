"""Image files: a folder (or URL) of class folders, a flat folder, or a zip of either with or without dataset.json.

Folders ``train`` and ``test`` (or ``validation``, ``valid``, ``val``) at the top make an official split, as in AFHQ and
ImageNet; classes are then the folders below. Empty folders are no classes.

A zip may hold ``dataset.json`` with ``{"labels": [["00000/img00000000.png", 6], ...]}``, as StyleGAN's and EDM's
data set tools write it; its labels then count, not its folders.
"""

import json
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tarflow_scale import storage
from tarflow_scale.errors import DataError
from tarflow_scale.shards.images import FILE_EXTENSIONS
from tarflow_scale.shards.sources.base import (
    BadImage,
    EncodedSource,
    Shaping,
    SplitLayout,
    as_label,
    numbered_classes,
    split_layout,
)

__all__ = ["FolderSource", "ZipSource", "classes_of"]

_EXTENSIONS = tuple(f".{extension}" for extension in FILE_EXTENSIONS)
_ZIP_LABELS = "dataset.json"
_MAX_MEMBER_BYTES = 1 << 30
_WANTED = f"looked for class/*.{', '.join(FILE_EXTENSIONS)}, or the same without classes"


def classes_of(names: list[str], where: str) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Class names and labels from relative paths: the first folder is the class; no folders, no classes.

    Raises:
        DataError: some images lie in class folders, some beside them.
    """
    folders = [name.split("/", 1)[0] if "/" in name else "" for name in names]
    class_names = sorted(set(folders))
    if class_names == [""]:
        return (), np.zeros(len(names), dtype=np.int64)
    if "" in class_names:
        stray = names[folders.index("")]
        raise DataError(f"images must lie all in class folders, or all in one (got {stray} beside them in {where})")
    number = {name: label for label, name in enumerate(class_names)}
    return tuple(class_names), np.array([number[folder] for folder in folders], dtype=np.int64)


def _layout_of(names: list[str]) -> SplitLayout | None:
    """The official split that the top folders make."""
    return split_layout([name.split("/", 1)[0] if "/" in name else None for name in names])


def _within_splits(names: list[str], layout: SplitLayout | None) -> list[str]:
    """Names below the folders of the split."""
    return names if layout is None else [name.split("/", 1)[1] for name in names]


def _digest(lines: Iterable[str]) -> str:
    return storage.digest("\n".join(lines).encode(errors="surrogateescape"))


def _is_image(name: str) -> bool:
    hidden = any(part.startswith((".", "__MACOSX")) for part in name.split("/"))
    return name.lower().endswith(_EXTENSIONS) and not hidden


def _kind(name: str) -> str:
    base = name.rpartition("/")[2]
    return f"*.{base.rpartition('.')[2].lower()}" if "." in base[1:] else base


class FolderSource(EncodedSource):
    """``path/class/**/*.png``: every sub-folder is a class, in alphabetical order; or ``path/*.png`` without classes.

    Args:
        path: the folder, local or URL.
        shaping: what is done to sizes.

    Raises:
        DataError: no folder, or no images in it.
    """

    def __init__(self, path: str, shaping: Shaping) -> None:
        if not storage.is_folder(path):
            raise DataError(f"source.path must be a folder (got {path}); check the path")
        files = list(storage.walk(path))
        found = [file for file in files if _is_image(file.name)]
        self.ignored = Counter(_kind(file.name) for file in files if not _is_image(file.name))
        if not found:
            raise DataError(f"no images in {path} ({_WANTED}); check source.path")
        layout = _layout_of([file.name for file in found])
        if layout is not None:
            found = [found[number] for number in layout.kept]
        self._path = path
        self.is_remote = storage.is_remote(path)
        self._names = [file.name for file in found]
        class_names, labels = classes_of(_within_splits(self._names, layout), path)
        order = np.argsort(labels, kind="stable")
        self._names = [self._names[i] for i in order]
        facts = {file.name: file for file in found}
        super().__init__(
            shaping,
            name=storage.base_name(path),
            description=f"image folder, {layout.words}" if layout else "image folder",
            class_names=class_names,
            labels=labels[order],
            digest=_digest(f"{name} {facts[name].num_bytes}" for name in self._names),
            official_test=layout.test[order] if layout else None,
            version=_digest(f"{name} {facts[name].num_bytes} {facts[name].version}" for name in self._names),
        )

    def encoded(self, number: int) -> bytes:
        """The file."""
        return storage.read_bytes(self.place(number))

    def origin(self, number: int) -> str:
        """Path below the folder."""
        return self._names[number]

    def place(self, number: int) -> str:
        """Path or URL of the file."""
        return f"{self._path.rstrip('/')}/{self._names[number]}"


class ZipSource(EncodedSource):
    """Images in a zip, with the labels of its ``dataset.json`` or else of its folders.

    Args:
        path: the zip, local or URL (then read by ranges).
        shaping: what is done to sizes.

    Raises:
        DataError: no zip, no images, or labels that do not cover them.
    """

    def __init__(self, path: str, shaping: Shaping) -> None:
        self._path = path
        self._zip: zipfile.ZipFile | None = None
        infos = {info.filename: info for info in self._open().infolist() if _is_image(info.filename)}
        if not infos:
            raise DataError(f"no images in {path} ({_WANTED}); check source.path")
        self._names = sorted(infos)
        labelled = _ZIP_LABELS in self._open().namelist()
        layout = None if labelled else _layout_of(self._names)
        if layout is not None:
            self._names = [self._names[number] for number in layout.kept]
        class_names, labels = (
            self._labels() if labelled else classes_of(_within_splits(self._names, layout), self._path)
        )
        facts = [f"{name} {infos[name].file_size} {infos[name].CRC}" for name in self._names]
        super().__init__(
            shaping,
            name=storage.base_name(path).removesuffix(".zip"),
            description=f"zip of images, {layout.words}" if layout else "zip of images",
            class_names=class_names,
            labels=labels,
            digest=_digest([*facts, str(labels.tolist())]),
            official_test=layout.test if layout else None,
        )

    def encoded(self, number: int) -> bytes:
        """The member, whose CRC the zip checks."""
        return self._member(self._names[number])

    def origin(self, number: int) -> str:
        """Name in the zip."""
        return self._names[number]

    def place(self, number: int) -> str:
        """Zip and member."""
        return f"{self._path}:{self._names[number]}"

    def _member(self, name: str) -> bytes:
        archive = self._open()
        size = archive.getinfo(name).file_size
        if size > _MAX_MEMBER_BYTES:
            raise BadImage(f"{self._path}:{name} is too large for an image ({size:,} bytes); remove it")
        try:
            return archive.read(name)
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError) as error:
            raise BadImage(f"{self._path}:{name} cannot be unpacked ({error}); replace the zip") from error

    def _open(self) -> zipfile.ZipFile:
        if self._zip is None:
            if not storage.exists(self._path):
                raise DataError(f"there is no {self._path}; check source.path")
            try:
                self._zip = zipfile.ZipFile(storage.open_seekable(self._path))
            except (zipfile.BadZipFile, EOFError, ValueError) as error:
                raise DataError(f"{self._path} is not a zip ({error}); check source.path") from error
        return self._zip

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_zip": None}  # an open file does not travel between processes

    def _labels(self) -> tuple[tuple[str, ...], NDArray[np.int64]]:
        content = self._member(_ZIP_LABELS)
        try:
            pairs = json.loads(content).get("labels")
            given = None if pairs is None else {str(name): label for name, label in pairs}
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(
                f"{_ZIP_LABELS} of {self._path} must hold labels as [[name, number], ...] (got {error}); mend it"
            ) from error
        known = None if given is None else {name: as_label(label, name) for name, label in given.items()}
        if known is None:
            return (), np.zeros(len(self._names), dtype=np.int64)
        missing = [name for name in self._names if name not in known]
        if missing:
            raise DataError(
                f"{_ZIP_LABELS} of {self._path} must label every image (got none for {missing[0]}"
                f"{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}); complete it"
            )
        labels = np.array([known[name] for name in self._names], dtype=np.int64)
        return numbered_classes(labels), labels
