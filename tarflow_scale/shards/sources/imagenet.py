"""Downsampled ImageNet in its published format (Chrabaszcz et al., arXiv 1707.08819)."""

import hashlib
import math
import re
import zipfile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tarflow_scale import storage
from tarflow_scale.errors import DataError
from tarflow_scale.runtime import console
from tarflow_scale.shards.images import NPY_FAULTS
from tarflow_scale.shards.sources.classes import numbered_classes
from tarflow_scale.shards.sources.source import ImageSource
from tarflow_scale.shards.sources.splits import train_then_test
from tarflow_scale.shards.sources.spool import Spool

__all__ = ["DownsampledImageNetSource"]


class DownsampledImageNetSource(ImageSource):
    """ImageNet at 8 to 64 pixels, from ``train_data_batch_*.npz`` and ``val_data.npz``, with the official split.

    Each file contains ``data (n, 3 S S)`` uint8 and ``labels`` from 1 to 1000. The images are unpacked into temporary
    files, which are memory-mapped, so that random access needs little memory. The temporary files are in ``TMPDIR``,
    are as large as the data, and are deleted when the process ends.

    Args:
        path: folder or URL of the files.

    Raises:
        DataError: a file is missing or damaged, or there is another ``.npz`` file.
    """

    def __init__(self, path: str) -> None:
        names = sorted(storage.list_sizes(path)) if storage.is_folder(path) else []
        train = sorted((n for n in names if re.fullmatch(r"train_data(_batch_\d+)?\.npz", n)), key=_batch_number)
        test = [name for name in names if name == "val_data.npz"]
        if not train:
            raise DataError(f"no train_data_batch_*.npz in {path}; check source.path")
        unknown = next((name for name in names if name.endswith(".npz") and name not in (*train, *test)), None)
        if unknown is not None:
            raise DataError(
                f".npz files in {path} must be train_data_batch_*.npz or val_data.npz (got {unknown}); rename it"
            )
        missing = sorted(set(range(1, _batch_number(train[-1]) + 1)) - set(map(_batch_number, train)))
        if missing:
            self.lines = [f"warning: train_data_batch_{missing[0]}.npz is missing (missing files: {len(missing)})"]
        if not test:
            self.lines = [*self.lines, "no val_data.npz: a share (split.test_fraction) of each class is held out"]
        with console.ProgressBar(len(train) + len(test), "unpack", unit="files") as bar:
            self._files: list[_Mapped] = []
            for name in [*train, *test]:
                self._files.append(_Mapped(storage.join(path, name)))
                bar.update(1)
        self._first = np.concatenate([[0], np.cumsum([file.shape[0] for file in self._files])])
        widths = {file.shape[1] for file in self._files}
        side = math.isqrt(min(widths) // 3)
        if len(widths) != 1 or 3 * side * side != min(widths):
            raise DataError(
                f"all files in {path} must hold data (n, 3 S S) of the same S (got rows of {sorted(widths)} values); "
                f"download them again"
            )
        self._side = side
        self.name = f"imagenet{side}"
        self.description = f"downsampled ImageNet {side}x{side}"
        self.labels = np.concatenate([file.labels for file in self._files]) - 1
        self.class_names = numbered_classes(self.labels)
        self.digest = storage.digest("\n".join(file.digest for file in self._files).encode() + self.labels.tobytes())
        if test:
            self.description += ", official split (test is its validation set)"
            self.official = train_then_test(int(self._first[len(train)]), len(self.labels))

    def _image(self, number: int) -> NDArray[np.uint8]:
        file, row = self._row_of(number)
        return np.array(file.rows()[row]).reshape(3, self._side, self._side)

    def origin(self, number: int) -> str:
        """Name of the file, and row of image ``number``."""
        file, row = self._row_of(number)
        return f"{file.name}/{row}"

    def _row_of(self, number: int) -> tuple["_Mapped", int]:
        file = int(np.searchsorted(self._first, number, side="right")) - 1
        return self._files[file], number - int(self._first[file])


def _batch_number(name: str) -> int:
    return int((re.findall(r"\d+", name) or ["0"])[0])


class _Mapped:
    """The arrays ``data`` (memory-mapped) and ``labels`` of an ``.npz``."""

    def __init__(self, location: str) -> None:
        self.name = location.rsplit("/", 1)[-1]
        self._spool = Spool()
        self._rows: NDArray[np.uint8] | None = None
        content = hashlib.sha256()
        try:
            with zipfile.ZipFile(storage.open_seekable(location)) as archive:
                with archive.open("labels.npy") as file:
                    self.labels: NDArray[np.int64] = np.lib.format.read_array(file, allow_pickle=False).astype(np.int64)
                with archive.open("data.npy") as source:
                    while block := source.read(1 << 22):
                        content.update(block)
                        self._spool.write(block)
            self.digest = content.hexdigest()
            self.shape = self.rows().shape
        except NPY_FAULTS as error:
            raise DataError(f"{location} must hold the arrays data and labels ({error}); download it again") from error
        self.labels = self.labels.reshape(-1)
        if self.rows().dtype != np.uint8 or len(self.shape) != 2 or len(self.labels) != self.shape[0]:
            raise DataError(
                f"{location} must hold data (n, 3 S S) uint8 and n labels (got {self.rows().dtype} {self.shape} and "
                f"{len(self.labels)} labels); download it again"
            )

    def rows(self) -> NDArray[np.uint8]:
        """The pixels, ``(n, 3 S S)`` uint8."""
        if self._rows is None:
            self._rows = np.lib.format.open_memmap(self._spool.path, mode="r")
        return self._rows

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_rows": None}  # mapped again in another process
