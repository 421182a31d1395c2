"""The index beside each tar: where every sample starts, and a checksum of its bytes.

With it, a sample or consecutive samples are one range read, and a reader that does not read the whole shard still
detects a flipped bit.
"""

import io
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tarflow_scale import storage
from tarflow_scale.errors import DataError
from tarflow_scale.shards.images import NPY_FAULTS

__all__ = ["ShardIndex", "checksum", "read_index"]


def checksum(content: bytes | memoryview) -> int:
    """CRC-32 of the first and of the second half of a sample's bytes, tar headers and padding included; 64 bits.

    It detects accidental damage at every read; the SHA-256 of the manifest detects any change. A cryptographic hash of
    a 512 px JPEG takes a fifth of the time of decoding it, this checksum a twentieth.
    """
    view = memoryview(content)
    middle = len(view) // 2
    return zlib.crc32(view[:middle]) << 32 | zlib.crc32(view[middle:])


_ALGORITHM = "crc32 of halves"
_ARRAYS = {"offsets": "int64", "checksums": "uint64"}


@dataclass(frozen=True)
class ShardIndex:
    """Byte offsets ``(n + 1,)`` int64 at which samples start (the last: where they end), checksums ``(n,)`` uint64."""

    offsets: NDArray[np.int64]
    checksums: NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.checksums)

    def to_bytes(self) -> bytes:
        """The ``.npz`` file; equal content gives equal bytes."""
        buffer = io.BytesIO()
        np.savez(buffer, offsets=self.offsets, checksums=self.checksums, algorithm=np.array(_ALGORITHM))
        return buffer.getvalue()


def read_index(location: str, samples: int, sha256: str, num_bytes: int) -> ShardIndex:
    """Read and check an index.

    Args:
        location: path or URL of the ``.index.npz``.
        samples: number of samples the manifest gives the shard.
        sha256: digest the manifest gives the index.
        num_bytes: size the manifest gives the shard.

    Raises:
        DataError: it is damaged or of another shard.
        StorageError: it cannot be read.
    """
    content = storage.read_bytes(location)
    if storage.digest(content) != sha256:
        raise DataError(f"{location} does not match its manifest (sha256 differs); pack the data set again")
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            arrays: dict[str, NDArray[Any]] = {name: file[name] for name in file.files}
    except (*NPY_FAULTS, AttributeError) as error:
        raise DataError(f"{location} is no index ({' '.join(str(error).split())}); pack the data set again") from error
    algorithm = str(arrays.get("algorithm", "none"))
    if algorithm != _ALGORITHM:
        raise DataError(f"{location} must have checksums of {_ALGORITHM} (got {algorithm}); pack the data set again")
    index = ShardIndex(*(arrays.get(name, np.zeros((), kind)) for name, kind in _ARRAYS.items()))
    for name, kind in _ARRAYS.items():
        array = getattr(index, name)
        if array.dtype != kind or array.ndim != 1:
            raise DataError(
                f"{name} of {location} must be a row of {kind} (got {array.dtype} {array.shape}); pack the data again"
            )
    if len(index) != samples or len(index.offsets) != samples + 1:
        raise DataError(
            f"{location} indexes {len(index)} samples (the manifest says {samples}); pack the data set again"
        )
    if int(index.offsets[0]) < 0 or int(index.offsets[-1]) > num_bytes or (np.diff(index.offsets) <= 0).any():
        raise DataError(
            f"offsets of {location} must rise within the {num_bytes:,} bytes of its shard (got "
            f"{int(index.offsets[0])} to {int(index.offsets[-1])}); pack the data set again"
        )
    return index
