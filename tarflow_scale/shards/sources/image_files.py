"""Image files in a folder (or URL) or a zip; `layout` finds their splits and classes."""

import zipfile
import zlib
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from tarflow_scale import storage
from tarflow_scale.config.prepare import SourceConfig, SplitConfig
from tarflow_scale.errors import DataError
from tarflow_scale.shards.sources.layout import lay_out
from tarflow_scale.shards.sources.source import BadImage, EncodedSource

__all__ = ["FolderSource", "ZipSource"]

_MAX_MEMBER_BYTES = 1 << 30


def _digest(lines: Iterable[str]) -> str:
    return storage.digest("\n".join(lines).encode(errors="surrogateescape"))


class _FileSource(EncodedSource):
    """Images in named files; `lay_out` finds their splits and classes."""

    _separator: str
    """Text between the path of the source and the name of a file."""

    def __init__(self, config: SourceConfig) -> None:
        super().__init__(config)
        self._path = config.path or ""

    def _set_images(self, files: Sequence[str], split: SplitConfig, kind: str) -> bool:
        """Find the images among ``files``; returns whether a label table or ``source.label_names`` is used."""
        images = lay_out(files, self._read, self._names_in, self._config, split, self._path)
        self._names, self.labels, self.official = images.names, images.labels, images.official
        self.class_names, self.ignored, self.lines = images.class_names, images.ignored, images.lines
        self._describe(kind, images.words)
        return images.by_table or bool(self._config.label_names)

    def encoded(self, number: int) -> bytes:
        """Content of the file of image ``number``."""
        return self._read(self._names[number])

    def origin(self, number: int) -> str:
        """Path of image ``number`` below the folder or in the zip."""
        return self._names[number]

    def place(self, number: int) -> str:
        """Path or URL of the file; for a zip, path or URL of the zip, and the member."""
        return self._place(self._names[number])

    def _place(self, name: str) -> str:
        return f"{self._path.rstrip('/')}{self._separator}{name}"

    @abstractmethod
    def _read(self, name: str) -> bytes: ...

    @abstractmethod
    def _names_in(self, folder: str) -> Iterable[str]:
        """Names of the files and folders (including empty ones) directly in a folder."""


class FolderSource(_FileSource):
    """Images below a folder, local or at a URL.

    Raises:
        DataError: the path is not a folder, the folder has no images, or its layout is ambiguous.
    """

    _separator = "/"

    def __init__(self, config: SourceConfig, split: SplitConfig) -> None:
        super().__init__(config)
        path = self._path
        if not storage.is_folder(path):
            kinds = {".tar": "webdataset", ".zip": "zip", ".parquet": "parquet"}
            kind = next((kind for suffix, kind in kinds.items() if path.lower().endswith(suffix)), None)
            cure = f"unpack it, or set source.kind={kind}" if kind else "check the path"
            raise DataError(f"source.path must be a folder (got {path}); {cure}")
        self.is_remote = storage.is_remote(path)
        files = {file.name: file for file in storage.walk(path)}
        has_names = self._set_images(list(files), split, "image folder")
        order = np.argsort(self.labels, kind="stable")
        self._names, self.labels = [self._names[i] for i in order], self.labels[order]
        self.official = None if self.official is None else self.official[order]
        self.name = storage.base_name(path)
        sizes = [f"{name} {files[name].num_bytes}" for name in self._names]
        self.digest = _digest([*sizes, *([str(self.labels.tolist()), *self.class_names] if has_names else [])])
        self.version = _digest(f"{line} {files[name].version}" for line, name in zip(sizes, self._names, strict=True))
        self._settle_shape()

    def _read(self, name: str) -> bytes:
        return storage.read_bytes(self._place(name))

    def _names_in(self, folder: str) -> list[str]:
        return storage.list_names(self._place(folder))


class ZipSource(_FileSource):
    """Images in a zip, with the same rules as `FolderSource`. From a URL, only the needed byte ranges are read."""

    _separator = ":"

    def __init__(self, config: SourceConfig, split: SplitConfig) -> None:
        super().__init__(config)
        self._zip: zipfile.ZipFile | None = None
        infos = {name: info for name, info in self._open().NameToInfo.items() if not name.endswith("/")}
        has_names = self._set_images(sorted(infos), split, "zip of images")
        self.name = storage.base_name(self._path).removesuffix(".zip")
        is_numbered = self.class_names == tuple(map(str, range(len(self.class_names))))
        naming = self.class_names if has_names and not is_numbered else ()
        contents = [f"{name} {infos[name].file_size} {infos[name].CRC}" for name in self._names]
        self.digest = _digest([*contents, str(self.labels.tolist()), *naming])
        self._settle_shape()

    def _read(self, name: str) -> bytes:
        """Read a member; `zipfile` checks its CRC."""
        archive = self._open()
        size = archive.getinfo(name).file_size
        if size > _MAX_MEMBER_BYTES:
            raise BadImage(f"{self._place(name)} is too large for an image ({size:,} bytes); remove it")
        try:
            return archive.read(name)
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError) as error:
            raise BadImage(f"{self._place(name)} cannot be unpacked ({error}); replace the zip") from error

    def _names_in(self, folder: str) -> set[str]:
        above = f"{folder}/" if folder else ""
        return {
            name.removeprefix(above).partition("/")[0] for name in self._open().NameToInfo if name.startswith(above)
        }

    def _open(self) -> zipfile.ZipFile:
        if self._zip is None:
            try:
                self._zip = zipfile.ZipFile(storage.open_seekable(self._path))
            except (zipfile.BadZipFile, EOFError, ValueError) as error:
                raise DataError(f"{self._path} is not a zip ({error}); check source.path") from error
            infos = self._zip.infolist()
            # Some programs on Windows write backslashes, others begin names with / or ./.
            names = [info.filename.replace("\\", "/").removeprefix("./").lstrip("/") for info in infos]
            double, times = Counter(names).most_common(1)[0] if names else ("", 0)
            if times > 1:
                raise DataError(
                    f"a zip must hold each file name once (got {double} {times} times in {self._path}); remove the "
                    f"repeated files"
                )
            self._zip.NameToInfo = dict(zip(names, infos, strict=True))
        return self._zip

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_zip": None}  # an open file cannot be pickled
