"""The index beside each tar: where every sample starts, and a checksum of its bytes.

With it a sample, or a run of samples, is one range read, and a reader that never sees the whole shard still
notices a flipped bit.
"""

import hashlib
import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tarflow_scale import storage
from tarflow_scale.errors import DataError

__all__ = ["ShardIndex", "checksum", "read_index"]


def checksum(content: bytes | memoryview) -> int:
    """64-bit BLAKE2b of a sample's bytes, tar headers and padding included."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


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
        np.savez(buffer, offsets=self.offsets, checksums=self.checksums)
        return buffer.getvalue()


def read_index(location: str, samples: int, sha256: str) -> ShardIndex:
    """Read and check an index.

    Args:
        location: path or URL of the ``.index.npz``.
        samples: number of samples the manifest gives the shard.
        sha256: digest the manifest gives the index.

    Raises:
        DataError: when it is missing, damaged or of another shard.
    """
    if not storage.exists(location):
        raise DataError(f"{location} is missing, though the manifest names its shard; pack the data set again")
    content = storage.read_bytes(location)
    if storage.digest(content) != sha256:
        raise DataError(f"{location} does not match its manifest (sha256 differs); pack the data set again")
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        index = ShardIndex(arrays["offsets"], arrays["checksums"])
    if len(index) != samples or len(index.offsets) != samples + 1:
        raise DataError(
            f"{location} indexes {len(index)} samples (the manifest says {samples}); pack the data set again"
        )
    return index
