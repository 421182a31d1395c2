"""Images from loader processes to their rank without a copy on the way: rings of arrays in shared memory.

A pipe copies every image four times, on processors that should decode. Shared memory here is an anonymous file, not
``/dev/shm``, of which a container has 64 MiB unless told otherwise.
"""

import mmap
import os
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["SharedRing"]


class SharedRing:
    """Zeroed uint8 arrays that processes share; pickled to a child, it is the same memory there.

    Args:
        shape: of all arrays together.
        descriptor: of the memory to attach; None makes new memory.

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
        """Give up the descriptor; the memory goes with the last array."""
        os.close(self._descriptor)


def _attached(shape: tuple[int, ...], duplicate: Any) -> SharedRing:
    return SharedRing(shape, duplicate.detach())
