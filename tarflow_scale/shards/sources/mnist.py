"""MNIST and other data sets in its format: one ``.npz``, or four IDX files, plain or gzipped.

An IDX file consists of two zero bytes, a type (8 is uint8), the number of axes, the length of each axis as a big-endian
uint32, and the values in row-major order (yann.lecun.com/exdb/mnist).
"""

import difflib
import gzip
import io
import math
import struct
import zlib

import numpy as np
from numpy.typing import NDArray

from tarflow_scale import storage
from tarflow_scale.errors import DataError
from tarflow_scale.shards.images import NPY_FAULTS
from tarflow_scale.shards.sources.arrays import ArraySource

__all__ = ["MnistSource", "read_idx"]

_IDX_NAMES = {
    ("train", "x"): "train-images-idx3-ubyte",
    ("train", "y"): "train-labels-idx1-ubyte",
    ("test", "x"): "t10k-images-idx3-ubyte",
    ("test", "y"): "t10k-labels-idx1-ubyte",
}
_IDX_UINT8 = 8
_MAX_FILE_BYTES = 1 << 30
"""Maximum unpacked size; the largest known file in this format, from EMNIST, unpacks to 550 MB."""


class MnistSource(ArraySource):
    """Square grey images of 8 bits with integer labels and an official split.

    Args:
        path: an ``.npz`` file with ``train_x train_y test_x test_y`` (or ``x_train ...``), or a folder (or URL) of
            the IDX files ``train-images-idx3-ubyte``, ``t10k-labels-idx1-ubyte`` and so on, plain or ``.gz``.

    Raises:
        DataError: a file is missing or damaged, or the numbers of images and labels differ.
    """

    def __init__(self, path: str) -> None:
        if path.endswith(".npz"):
            arrays, unused = _read_npz(path)
        else:
            names, unused = storage.list_names(path), list[str]()
            arrays = {key: _read_idx(path, name, names) for key, name in _IDX_NAMES.items()}
        self.lines = (f"left out: arrays {', '.join(unused)}, which belong to neither split",) if unused else ()
        for split in ("train", "test"):
            _check(arrays[split, "x"], arrays[split, "y"], f"{split} of {path}")
        if arrays["train", "x"].shape[1:] != arrays["test", "x"].shape[1:]:
            raise DataError(
                f"both splits must have images of the same size (got {arrays['train', 'x'].shape[1:]} and "
                f"{arrays['test', 'x'].shape[1:]} in {path}); check the files"
            )
        name = path.rstrip("/").rpartition("/")[2].removesuffix(".npz")
        train, test = ((arrays[part, "x"][:, None], arrays[part, "y"].astype(np.int64)) for part in ("train", "test"))
        super().__init__(name, "MNIST format, official split", (), train, test)


def read_idx(content: bytes, name: str) -> NDArray[np.uint8]:
    """Read the values of an IDX file.

    Args:
        content: the file.
        name: name of the file, for messages.

    Raises:
        DataError: the content is not an IDX file of unsigned bytes, or its length does not match its header.
    """
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != _IDX_UINT8:
        raise DataError(f"{name} is not an IDX file of unsigned bytes (starts with {content[:4]!r}); check the file")
    axes, start = content[3], 4 + 4 * content[3]
    if len(content) < start:
        raise DataError(f"{name} ends inside its header (got {len(content)} bytes); download it again")
    shape = struct.unpack(f">{axes}I", content[4:start])
    if len(content) - start != math.prod(shape):
        raise DataError(
            f"{name} must hold {math.prod(shape)} values (got {len(content) - start} for the shape {shape}); "
            f"download it again"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _read_idx(path: str, name: str, names: list[str]) -> NDArray[np.uint8]:
    """Read the IDX file ``name``, which may be gzipped; its name may have a dot instead of a hyphen before ``idx``."""
    dotted = name.replace("-idx", ".idx")
    present = next((file for file in (name, dotted, f"{name}.gz", f"{dotted}.gz") if file in names), None)
    if present is None:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
        raise DataError(
            f"no {name} or {name}.gz in {path}{f' (there is {near[0]}; rename it)' if near else ''}; set source.path "
            f"to an .npz file or the folder of the IDX files"
        )
    location = storage.join(path, present)
    content = storage.read_bytes(location)
    if present.endswith(".gz"):
        try:
            with gzip.open(io.BytesIO(content)) as file:
                content = file.read(_MAX_FILE_BYTES + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{location} cannot be unpacked ({error}); download it again") from error
        if len(content) > _MAX_FILE_BYTES:
            raise DataError(f"{location} holds more than {_MAX_FILE_BYTES:,} bytes; download it again")
    return read_idx(content, location)


def _read_npz(path: str) -> tuple[dict[tuple[str, str], NDArray[np.uint8]], list[str]]:
    """The arrays of the two splits, and the names of all other arrays."""
    try:
        with np.load(io.BytesIO(storage.read_bytes(path)), allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("it is a single array")
            names: dict[tuple[str, str], str] = {}
            for split, part in _IDX_NAMES:
                usual = f"{split}_{part}", f"{part}_{split}"  # the second as in Keras
                name = next((name for name in usual if name in file.files), None)
                if name is None:
                    shown = ", ".join(sorted(file.files))
                    raise DataError(f"{path} must hold {' or '.join(usual)} (got {shown}); rename its arrays")
                names[split, part] = name
            return {key: file[name] for key, name in names.items()}, sorted(set(file.files) - set(names.values()))
    except NPY_FAULTS as error:
        raise DataError(f"{path} is not an .npz file of plain arrays ({error}); check the file") from error


def _check(images: NDArray[np.uint8], labels: NDArray[np.uint8], origin: str) -> None:
    if images.dtype != np.uint8 or images.ndim != 3:
        raise DataError(
            f"images must be an array (n, H, W) of uint8 (got {images.shape} {images.dtype} in {origin}); convert them"
        )
    integers = np.issubdtype(labels.dtype, np.integer)
    if not integers or labels.shape != (len(images),) or len(labels) == 0 or int(labels.min()) < 0:
        raise DataError(
            f"each of {len(images)} images must have one label, a whole number of at least 0 (got labels "
            f"{labels.shape} {labels.dtype} in {origin}); check the labels"
        )
