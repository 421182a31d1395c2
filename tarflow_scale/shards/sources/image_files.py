"""Image files in a folder (or URL) or a zip; `layout` has the rules that find their splits and classes."""

import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable
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


def _plain_name(name: str) -> str:
    """The path of a member; some programs on Windows write backslashes, others begin with ``/`` or ``./``."""
    return name.replace("\\", "/").removeprefix("./").lstrip("/")


class FolderSource(EncodedSource):
    """Images below a folder, local or at a URL.

    Raises:
        DataError: no folder, no images in it, or an ambiguous layout.
    """

    def __init__(self, config: SourceConfig, split: SplitConfig) -> None:
        super().__init__(config)
        path = config.path or ""
        if not storage.is_folder(path):
            kinds = {".tar": "webdataset", ".zip": "zip", ".parquet": "parquet"}
            kind = next((kind for suffix, kind in kinds.items() if path.lower().endswith(suffix)), None)
            cure = f"unpack it, or set source.kind={kind}" if kind else "check the path"
            raise DataError(f"source.path must be a folder (got {path}); {cure}")
        self._path = path
        self.is_remote = storage.is_remote(path)
        files = {file.name: file for file in storage.walk(path)}
        images = lay_out(list(files), lambda name: storage.read_bytes(self._place(name)), config, split, path)
        order = np.argsort(images.labels, kind="stable")
        self._names = [images.names[i] for i in order]
        self.name = storage.base_name(path)
        self.class_names, self.labels = images.class_names, images.labels[order]
        self.official = None if images.official is None else images.official[order]
        self.ignored, self.lines = images.ignored, images.lines
        sizes = [f"{name} {files[name].num_bytes}" for name in self._names]
        naming = [str(self.labels.tolist()), *self.class_names] if images.by_table or config.label_names else []
        self.digest = _digest([*sizes, *naming])
        self.version = _digest(f"{line} {files[name].version}" for line, name in zip(sizes, self._names, strict=True))
        self._describe("image folder", images.words)
        self._settle_shape()

    def encoded(self, number: int) -> bytes:
        """The file."""
        return storage.read_bytes(self.place(number))

    def origin(self, number: int) -> str:
        """Path below the folder."""
        return self._names[number]

    def place(self, number: int) -> str:
        """Path or URL of the file."""
        return self._place(self._names[number])

    def _place(self, name: str) -> str:
        return f"{self._path.rstrip('/')}/{name}"


class ZipSource(EncodedSource):
    """Images in a zip, with the rules of `FolderSource`; of a zip at a URL, only ranges are read."""

    def __init__(self, config: SourceConfig, split: SplitConfig) -> None:
        super().__init__(config)
        self._path = config.path or ""
        self._zip: zipfile.ZipFile | None = None
        infos = {name: info for name, info in self._open().NameToInfo.items() if not name.endswith("/")}
        images = lay_out(sorted(infos), self._member, config, split, self._path)
        self._names = images.names
        self.name = storage.base_name(self._path).removesuffix(".zip")
        self.class_names, self.labels, self.official = images.class_names, images.labels, images.official
        self.ignored, self.lines = images.ignored, images.lines
        is_numbered = self.class_names == tuple(map(str, range(len(self.class_names))))
        naming = self.class_names if (images.by_table or config.label_names) and not is_numbered else ()
        contents = [f"{name} {infos[name].file_size} {infos[name].CRC}" for name in self._names]
        self.digest = _digest([*contents, str(self.labels.tolist()), *naming])
        self._describe("zip of images", images.words)
        self._settle_shape()

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
            infos = self._zip.infolist()
            names = [_plain_name(info.filename) for info in infos]
            double, times = Counter(names).most_common(1)[0] if names else ("", 0)
            if times > 1:
                raise DataError(f"names in a zip must differ (got {double} {times} times in {self._path}); remove one")
            self._zip.NameToInfo = dict(zip(names, infos, strict=True))
        return self._zip

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_zip": None}  # an open file does not travel between processes
