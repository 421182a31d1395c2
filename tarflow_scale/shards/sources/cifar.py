"""CIFAR-10 and CIFAR-100, as pickles or binary files (www.cs.toronto.edu/~kriz/cifar.html).

The pickles are read by an unpickler that accepts only containers, strings, numbers and NumPy arrays of numbers, so that
no file can run code. It does not call NumPy's unpickling code, because a forged dtype can make that code treat bytes
from the file as pointers.
"""

import io
import pickle
import re
import tarfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tarflow_scale import storage
from tarflow_scale.errors import DataError
from tarflow_scale.shards.headers import check_member
from tarflow_scale.shards.sources.arrays import ArraySource, ImagesAndLabels

__all__ = ["CifarSource", "restricted_unpickle"]

_SIDE = 32
_NUM_VALUES = 3 * _SIDE * _SIDE
_MAX_ARCHIVE_BYTES = 1 << 29
"""Maximum unpacked size; CIFAR unpacks to 186 MB."""


@dataclass(frozen=True)
class _Format:
    """File names and contents of a data set in one format.

    Args:
        name: name of the data set.
        train, test: names of the files that contain images.
        names: name of the file that lists the class names.
        label_key, names_key: keys of the labels and of the class names in pickles.
        label_bytes: number of label bytes per row of a binary file; the last one is the label. 0 for pickles.
        num_classes: number of classes, to check the labels in binary files.
    """

    name: str
    train: tuple[str, ...]
    test: str
    names: str
    label_key: bytes = b""
    names_key: bytes = b""
    label_bytes: int = 0
    num_classes: int = 0


_CIFAR10_TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
_FORMATS = (
    _Format("cifar10", _CIFAR10_TRAIN, "test_batch", "batches.meta", b"labels", b"label_names"),
    _Format(
        "cifar10",
        tuple(f"{name}.bin" for name in _CIFAR10_TRAIN),
        "test_batch.bin",
        "batches.meta.txt",
        label_bytes=1,
        num_classes=10,
    ),
    _Format("cifar100", ("train",), "test", "meta", b"fine_labels", b"fine_label_names"),
    _Format("cifar100", ("train.bin",), "test.bin", "fine_label_names.txt", label_bytes=2, num_classes=100),
)


class CifarSource(ArraySource):
    """CIFAR-10, or CIFAR-100 with fine labels; both have the official split.

    Args:
        path: folder (or URL) of the pickles or binary files, or the ``.tar.gz`` that contains them.

    Raises:
        DataError: a file is missing or damaged.
    """

    def __init__(self, path: str) -> None:
        files = _read_files(path)
        form = next((form for form in _FORMATS if form.train[0] in files), None)
        if form is None:
            raise DataError(
                f"no CIFAR batches in {path} (looked for data_batch_1, train, data_batch_1.bin, train.bin); "
                f"check source.path"
            )
        batches = [_batch(files, name, form) for name in form.train]
        train = np.concatenate([x for x, _ in batches]), np.concatenate([y for _, y in batches])
        test = _batch(files, form.test, form)
        super().__init__(form.name, f"{form.name}, official split", _class_names(files, form), train, test)


def _read_files(path: str) -> dict[str, bytes]:
    """Contents of the files in a folder or tar, by file name."""
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
                        f"{path} must hold only the files of CIFAR, at most {_MAX_ARCHIVE_BYTES:,} bytes (got "
                        f"{total:,} bytes up to the member {member.name!r:.80}); download it again"
                    )
                file = tar.extractfile(member) if member.isreg() else None
                if file is not None:
                    files[member.name.rsplit("/", 1)[-1]] = file.read()
            return files
    except (tarfile.TarError, EOFError, OSError, ValueError, OverflowError, zlib.error) as error:
        raise DataError(f"{path} cannot be unpacked ({error}); download it again") from error


def _batch(files: dict[str, bytes], name: str, form: _Format) -> ImagesAndLabels:
    if name not in files:
        raise DataError(f"the batch {name} is missing (got {', '.join(sorted(files)[:8])}); download CIFAR again")
    data, labels = (_binary if form.label_bytes else _pickled)(files[name], name, form)
    if data.ndim != 2 or data.shape[1] != _NUM_VALUES or labels.shape != (len(data),) or labels.dtype.kind != "i":
        raise DataError(
            f"{name} must hold images of {_NUM_VALUES} values and one label for each image (got images {data.shape} "
            f"and labels {labels.shape}); download it again"
        )
    return data.reshape(-1, 3, _SIDE, _SIDE), labels.astype(np.int64)


def _pickled(content: bytes, name: str, form: _Format) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    batch = restricted_unpickle(content, name)
    data, labels = _value(batch, b"data"), _value(batch, form.label_key)
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or not isinstance(labels, list):
        raise DataError(
            f"{name} must hold data and {form.label_key.decode()} in CIFAR's format (got a {type(batch).__name__} "
            f"in another format); download it again"
        )
    try:
        return data, np.array(labels)
    except (ValueError, OverflowError) as error:
        raise DataError(f"labels of {name} are not a list of numbers ({error}); download it again") from error


def _binary(content: bytes, name: str, form: _Format) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    row = form.label_bytes + _NUM_VALUES
    if not content or len(content) % row:
        raise DataError(f"{name} must hold rows of {row} bytes (got {len(content)} bytes); download it again")
    rows = np.frombuffer(content, np.uint8).reshape(-1, row)
    labels = rows[:, form.label_bytes - 1].astype(np.int64)
    if labels.max() >= form.num_classes:
        raise DataError(
            f"labels of {name} must be from 0 to {form.num_classes - 1} (got {labels.max()}); download it again"
        )
    return rows[:, form.label_bytes :], labels


def _class_names(files: Mapping[str, bytes], form: _Format) -> tuple[str, ...]:
    if form.label_bytes:
        return tuple(files.get(form.names, b"").decode(errors="replace").split())
    texts = _value(restricted_unpickle(files[form.names], form.names), form.names_key) if form.names in files else None
    return tuple(text.decode() if isinstance(text, bytes) else str(text) for text in texts or ())


def _value(mapping: Any, key: bytes) -> Any:
    """Value of a key, which is bytes in Python 2 pickles and text in Python 3 pickles; None if the key is missing."""
    return mapping.get(key, mapping.get(key.decode())) if isinstance(mapping, dict) else None


class _PlainType:
    """Takes the place of ``numpy.dtype`` in a pickle and accepts only types of numbers."""

    def __init__(self, name: object, *_: object) -> None:
        text = name.decode("ascii") if isinstance(name, bytes) else name
        if not isinstance(text, str) or not re.fullmatch(r"[biuf][1248]", text):
            raise pickle.UnpicklingError(f"an array has the type {name!r:.40}")
        self.plain = np.dtype(text)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Read the byte order from ``(version, byte order, ...)``; the rest, for structured types, is ignored."""
        order = state[1].decode("ascii") if isinstance(state[1], bytes) else state[1]
        if order not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError(f"an array has the byte order {order!r:.40}")
        self.plain = self.plain.newbyteorder(order)


class _PlainArray:
    """Takes the place of an array until the whole pickle is read."""

    def __init__(self, *_: object) -> None:
        self.array: NDArray[Any] = np.zeros(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Read the array from ``(version, shape, dtype, whether it is in Fortran order, bytes)``."""
        _, shape, kind, fortran, content = state
        if not isinstance(kind, _PlainType) or not isinstance(content, bytes):
            raise pickle.UnpicklingError("an array does not consist of numbers")
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
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return _ALLOWED[module, name]


def restricted_unpickle(content: bytes, origin: str) -> Any:
    """Read a pickle of an array, or of a dictionary with arrays as values; Python 2 strings become bytes.

    Args:
        content: the pickle.
        origin: name of the file, for messages.

    Raises:
        DataError: the content is not a pickle, or contains anything other than containers, strings, numbers and
            arrays of numbers.
    """
    try:
        loaded = _Unpickler(io.BytesIO(content), encoding="bytes").load()
        if isinstance(loaded, dict):
            return {key: value.array if isinstance(value, _PlainArray) else value for key, value in loaded.items()}
        return loaded.array if isinstance(loaded, _PlainArray) else loaded
    except Exception as error:  # a damaged pickle can raise anything
        raise DataError(f"{origin} is not a pickle of plain arrays ({error}); download it again") from error
