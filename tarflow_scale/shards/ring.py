"""Images from loader processes to their rank without copies: rings of arrays in shared memory.

A pipe would copy every image four times, with processor time that decoding needs. The shared memory is an anonymous
file, not in ``/dev/shm``, which has 64 MiB in a container by default.
"""

import mmap
import os
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["SharedRing"]


class SharedRing:
    """Zeroed uint8 arrays that processes share; a pickled ring is the same memory in a child process.

    Args:
        shape: of all arrays together.
        descriptor: of memory to attach; None creates new memory.

    Raises:
        OSError: no memory is left.
    """

    def __init__(self, shape: tuple[int, ...], descriptor: int | None = None) -> None:
        num_bytes = int(np.prod(shape))
        self._descriptor = os.memfd_create("tarflow-scale-batches") if descriptor is None else descriptor
        if descriptor is None:
            os.ftruncate(self._descriptor, num_bytes)
        self.arrays: NDArray[np.uint8] = np.frombuffer(mmap.mmap(self._descriptor, num_bytes), np.uint8).reshape(shape)

    def __reduce__(self) -> tuple[Any, ...]:
        return _attached, (self.arrays.shape, DupFd(self._descriptor))

    def close(self) -> None:
        """Close the descriptor; the memory is freed with the last array."""
        os.close(self._descriptor)


def _attached(shape: tuple[int, ...], duplicate: Any) -> SharedRing:
    return SharedRing(shape, duplicate.detach())
