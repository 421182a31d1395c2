"""Arrays of pixels: CIFAR-10 and -100 in both of their formats, and downsampled ImageNet.

CIFAR's Python version is pickles. They are read by an unpickler that knows NumPy arrays of plain numbers, numbers,
strings and containers; anything else in a file is refused, so that no file can run code. NumPy's own unpickling is not
called: a dtype in a pickle says of itself whether its elements are pointers, and NumPy believes it
(www.cs.toronto.edu/~kriz/cifar.html; Chrabaszcz et al., arXiv 1707.08819, for downsampled ImageNet).
"""

import hashlib
import io
import math
import pickle
import re
import tarfile
import zipfile
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tarflow_scale import storage
from tarflow_scale.errors import DataError
from tarflow_scale.runtime import console
from tarflow_scale.shards.headers import check_member
from tarflow_scale.shards.images import NPY_FAULTS
from tarflow_scale.shards.sources.classes import numbered_classes
from tarflow_scale.shards.sources.source import ImageSource
from tarflow_scale.shards.sources.splits import train_then_test
from tarflow_scale.shards.sources.spool import Spool

__all__ = ["ArraySource", "CifarSource", "DownsampledImageNetSource", "restricted_unpickle"]

_SIDE = 32
_CIFAR10_TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
_MAX_ARCHIVE_BYTES = 1 << 29
"""CIFAR has 186 MB."""
ImagesAndLabels = tuple[NDArray[np.uint8], NDArray[np.int64]]


class _PlainType:
    """What stands for ``numpy.dtype`` in a pickle: one of numbers."""

    def __init__(self, name: object, *_: object) -> None:
        text = name.decode("ascii") if isinstance(name, bytes) else name
        if not isinstance(text, str) or not re.fullmatch(r"[biuf][1248]", text):
            raise pickle.UnpicklingError(f"it has an array of {name!r:.40}")
        self.plain = np.dtype(text)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """``(version, byte order, ...)``: the rest is of structures, or is known."""
        order = state[1].decode("ascii") if isinstance(state[1], bytes) else state[1]
        if order not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError(f"it has a byte order {order!r:.40}")
        self.plain = self.plain.newbyteorder(order)


class _PlainArray:
    """What stands for an array in a pickle until all of it is read."""

    def __init__(self, *_: object) -> None:
        self.array: NDArray[Any] = np.zeros(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """``(version, shape, dtype, whether in Fortran's order, bytes)``."""
        _, shape, kind, fortran, content = state
        if not isinstance(kind, _PlainType) or not isinstance(content, bytes):
            raise pickle.UnpicklingError("it has an array of other things than numbers")
        self.array = np.frombuffer(content, kind.plain).reshape(shape, order="F" if fortran else "C")


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _PlainArray,
    ("numpy._core.multiarray", "_reconstruct"): _PlainArray,
    ("numpy", "ndarray"): _PlainArray,
    ("numpy", "dtype"): _PlainType,
    ("_codecs", "encode"): lambda text, _: text.encode("latin-1"),  # how protocol 2 writes bytes
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return _ALLOWED[module, name]


def restricted_unpickle(content: bytes, what: str) -> Any:
    """What a pickle holds: an array, or a dictionary, whose values may be arrays; bytes of Python 2 stay bytes.

    Raises:
        DataError: it is no pickle, or wants anything else than containers, numbers, strings and arrays of numbers.
    """
    try:
        found = _Unpickler(io.BytesIO(content), encoding="bytes").load()
        if isinstance(found, dict):
            return {key: value.array if isinstance(value, _PlainArray) else value for key, value in found.items()}
        return found.array if isinstance(found, _PlainArray) else found
    except Exception as error:  # a damaged pickle can raise anything
        raise DataError(f"{what} is not a pickle of plain arrays ({error}); download it again") from error


class ArraySource(ImageSource):
    """Images ``(n, C, H, W)`` uint8 and labels in memory, first those for training, then those for testing.

    Args:
        name: of the data set.
        description: for the manifest.
        class_names: numbers where it is empty.
        train: images and labels.
        test: images and labels.
    """

    def __init__(
        self, name: str, description: str, class_names: tuple[str, ...], train: ImagesAndLabels, test: ImagesAndLabels
    ) -> None:
        self._images = np.concatenate([train[0], test[0]])
        self._num_train = len(train[0])
        labels = np.concatenate([train[1], test[1]])
        super().__init__(
            name=name,
            description=description,
            class_names=class_names or numbered_classes(labels),
            bit_depth=8,
            labels=labels,
            digest=storage.digest(self._images.tobytes() + labels.tobytes()),
            official=train_then_test(self._num_train, len(labels)),
        )

    def image(self, number: int) -> NDArray[np.uint8]:
        """Image ``number`` as ``(C, H, W)`` uint8."""
        return self._images[number]

    def origin(self, number: int) -> str:
        """``train/17`` or ``test/3``."""
        return f"train/{number}" if number < self._num_train else f"test/{number - self._num_train}"


class CifarSource(ArraySource):
    """CIFAR-10 or -100 with the official split, from pickles or binaries, unpacked or as ``.tar.gz``.

    Args:
        path: folder (or URL) of the batches, or the archive. CIFAR-100 has its fine labels.

    Raises:
        DataError: a batch is missing or damaged.
    """

    def __init__(self, path: str) -> None:
        files = _read_files(path)
        (train, test), classes, name = self._parts(files, path)
        super().__init__(name, f"{name}, official split", classes, train, test)

    @staticmethod
    def _parts(
        files: dict[str, bytes], path: str
    ) -> tuple[tuple[ImagesAndLabels, ImagesAndLabels], tuple[str, ...], str]:
        if "data_batch_1" in files:
            return *_pickled(
                files, _CIFAR10_TRAIN, "test_batch", b"labels", ("batches.meta", b"label_names")
            ), "cifar10"
        if "data_batch_1.bin" in files:
            names = [f"{name}.bin" for name in _CIFAR10_TRAIN]
            return *_binary(files, names, "test_batch.bin", 1, "batches.meta.txt", 10), "cifar10"
        if "train" in files:
            return *_pickled(files, ("train",), "test", b"fine_labels", ("meta", b"fine_label_names")), "cifar100"
        if "train.bin" in files:
            return *_binary(files, ["train.bin"], "test.bin", 2, "fine_label_names.txt", 100), "cifar100"
        raise DataError(
            f"no CIFAR batches in {path} (looked for data_batch_1, train, data_batch_1.bin, train.bin); "
            f"check source.path"
        )


def _read_files(path: str) -> dict[str, bytes]:
    """Base name to content of the files of a folder or of a tar."""
    if not storage.exists(path):
        raise DataError(f"there is no {path}; check source.path")
    if not path.endswith((".tar.gz", ".tgz", ".tar")):
        return {name: storage.read_bytes(storage.join(path, name)) for name in storage.list_sizes(path)}
    try:
        with tarfile.open(fileobj=io.BytesIO(storage.read_bytes(path))) as tar:
            files, total = dict[str, bytes](), 0
            for member in tar:
                check_member(member)
                total += member.size
                if total > _MAX_ARCHIVE_BYTES:
                    raise DataError(
                        f"{path} must hold files of CIFAR alone (got {total:,} bytes up to {member.name!r:.80}); "
                        f"download it again"
                    )
                file = tar.extractfile(member) if member.isreg() else None
                if file is not None:
                    files[member.name.rsplit("/", 1)[-1]] = file.read()
            return files
    except (tarfile.TarError, EOFError, OSError, ValueError, OverflowError, zlib.error) as error:
        raise DataError(f"{path} cannot be unpacked ({error}); download it again") from error


def _batch(files: dict[str, bytes], name: str) -> bytes:
    if name not in files:
        raise DataError(f"the batch {name} is missing (got {', '.join(sorted(files)[:8])}); download CIFAR again")
    return files[name]


def _pickled(
    files: dict[str, bytes], train: tuple[str, ...], test: str, key: bytes, meta: tuple[str, bytes]
) -> tuple[tuple[ImagesAndLabels, ImagesAndLabels], tuple[str, ...]]:
    def read(name: str) -> ImagesAndLabels:
        batch = restricted_unpickle(_batch(files, name), name)
        data = batch.get(b"data", batch.get("data")) if isinstance(batch, dict) else None
        labels = batch.get(key, batch.get(key.decode())) if isinstance(batch, dict) else None
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or not isinstance(labels, list):
            raise DataError(f"{name} must hold data and {key.decode()} (got {type(batch).__name__}); download it again")
        try:
            return _checked(data, np.array(labels), name)
        except (ValueError, OverflowError) as error:
            raise DataError(f"labels of {name} are no list of numbers ({error}); download it again") from error

    names: list[str] = []
    if meta[0] in files:
        found = restricted_unpickle(files[meta[0]], meta[0])
        texts = found.get(meta[1], found.get(meta[1].decode(), [])) if isinstance(found, dict) else []
        names = [text.decode() if isinstance(text, bytes) else str(text) for text in texts]
    parts = (_joined([read(name) for name in train]), read(test))
    return parts, tuple(names)


def _binary(
    files: dict[str, bytes], train: list[str], test: str, label_bytes: int, names_file: str, classes: int
) -> tuple[tuple[ImagesAndLabels, ImagesAndLabels], tuple[str, ...]]:
    row = label_bytes + 3 * _SIDE * _SIDE

    def read(name: str) -> ImagesAndLabels:
        content = _batch(files, name)
        if not content or len(content) % row:
            raise DataError(f"{name} must hold rows of {row} bytes (got {len(content)} bytes); download it again")
        rows = np.frombuffer(content, np.uint8).reshape(-1, row)
        labels = rows[:, label_bytes - 1].astype(np.int64)
        if labels.max() >= classes:
            raise DataError(f"labels of {name} must lie in 0..{classes - 1} (got {labels.max()}); download it again")
        return _checked(rows[:, label_bytes:], labels, name)

    names = files.get(names_file, b"").decode(errors="replace").split()
    parts = (_joined([read(name) for name in train]), read(test))
    return parts, tuple(names)


def _checked(data: NDArray[np.uint8], labels: NDArray[Any], name: str) -> ImagesAndLabels:
    if data.ndim != 2 or data.shape[1] != 3 * _SIDE * _SIDE or labels.shape != (len(data),) or labels.dtype.kind != "i":
        raise DataError(
            f"{name} must hold one label for each image of {3 * _SIDE * _SIDE} values (got {labels.shape} and "
            f"{data.shape}); download it again"
        )
    return data.reshape(-1, 3, _SIDE, _SIDE), labels.astype(np.int64)


def _joined(parts: list[ImagesAndLabels]) -> ImagesAndLabels:
    return np.concatenate([x for x, _ in parts]), np.concatenate([y for _, y in parts])


class DownsampledImageNetSource(ImageSource):
    """ImageNet at 8 to 64 pixels as published: ``train_data_batch_1.npz`` ... and ``val_data.npz``; official split.

    Each holds ``data (n, 3 S S)`` uint8 and ``labels`` 1..1000. The arrays are unpacked into temporary files (in
    ``TMPDIR``, as large as the data, gone when the process ends) and mapped, so that memory stays small whatever the
    order of reading.

    Args:
        path: folder or URL of the files.

    Raises:
        DataError: files are missing or damaged.
    """

    def __init__(self, path: str) -> None:
        names = sorted(storage.list_sizes(path)) if storage.is_folder(path) else []
        train = sorted((n for n in names if re.fullmatch(r"train_data(_batch_\d+)?\.npz", n)), key=_batch_number)
        test = [name for name in names if name == "val_data.npz"]
        if not train:
            raise DataError(f"no train_data_batch_*.npz in {path}; check source.path")
        other = next((name for name in names if name.endswith(".npz") and name not in (*train, *test)), None)
        if other is not None:
            raise DataError(f"files of {path} must be train_data_batch_*.npz and val_data.npz (got {other}); rename it")
        missing = sorted(set(range(1, _batch_number(train[-1]) + 1)) - set(map(_batch_number, train)))
        if missing:
            self.lines = [f"warning: train_data_batch_{missing[0]}.npz is missing ({len(missing)} in all)"]
        if not test:
            self.lines = [*self.lines, "no val_data.npz: split.test_fraction of each class is held out of train"]
        with console.progress_bar(len(train) + len(test), "unpack", unit="files") as bar:
            self._files: list[_Mapped] = []
            for name in [*train, *test]:
                self._files.append(_Mapped(storage.join(path, name)))
                bar.update(1)
        self._first = np.concatenate([[0], np.cumsum([file.shape[0] for file in self._files])])
        widths = {file.shape[1] for file in self._files}
        side = math.isqrt(min(widths) // 3)
        if len(widths) != 1 or 3 * side * side != min(widths):
            raise DataError(f"data of {path} must be (n, 3 S S) in every file (got widths {sorted(widths)})")
        self._side = side
        labels = np.concatenate([file.labels for file in self._files]) - 1
        digests = "\n".join(file.digest for file in self._files)
        super().__init__(
            name=f"imagenet{side}",
            description=f"downsampled ImageNet {side}x{side}"
            + (", official split (test is its validation set)" if test else ""),
            class_names=numbered_classes(labels),
            bit_depth=8,
            labels=labels,
            digest=storage.digest(digests.encode() + labels.tobytes()),
            official=train_then_test(int(self._first[len(train)]), len(labels)) if test else None,
        )

    def image(self, number: int) -> NDArray[np.uint8]:
        """Image ``number`` as ``(3, S, S)`` uint8."""
        file = int(np.searchsorted(self._first, number, side="right")) - 1
        row = self._files[file].rows()[number - int(self._first[file])]
        return np.array(row).reshape(3, self._side, self._side)

    def origin(self, number: int) -> str:
        """File and row."""
        file = int(np.searchsorted(self._first, number, side="right")) - 1
        return f"{self._files[file].name}/{number - int(self._first[file])}"


def _batch_number(name: str) -> int:
    return int((re.findall(r"\d+", name) or ["0"])[0])


class _Mapped:
    """``data`` of one ``.npz``, mapped into memory; and its ``labels``."""

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
            raise DataError(f"{location} must hold data and labels (got: {error}); download it again") from error
        self.labels = self.labels.reshape(-1)
        if self.rows().dtype != np.uint8 or len(self.shape) != 2 or len(self.labels) != self.shape[0]:
            raise DataError(
                f"{location} must hold data (n, 3 S S) uint8 and n labels (got {self.rows().dtype} {self.shape} and "
                f"{len(self.labels)}); download it again"
            )

    def rows(self) -> NDArray[np.uint8]:
        """``(n, 3 S S)``."""
        if self._rows is None:
            self._rows = np.lib.format.open_memmap(self._spool.path, mode="r")
        return self._rows

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_rows": None}  # mapped again in another process
