"""Arrays in shared memory, through which loader processes pass images to their rank.

A pipe would copy every image four times, and use processor time that decoding needs. The shared memory is an anonymous
file outside ``/dev/shm``, because ``/dev/shm`` has only 64 MiB by default in a container.
"""

import mmap
import os
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["SharedRing"]


class SharedRing:
    """Arrays of uint8 in shared memory, initially zero. A child process that receives the ring uses the same memory.

    Args:
        shape: shape of the attribute ``arrays``, which stacks all arrays.
        descriptor: file descriptor of existing memory; None creates new memory.

    Raises:
        OSError: there is not enough memory.
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
        """Close the file descriptor. The memory is freed when the last array is deleted."""
        os.close(self._descriptor)


def _attached(shape: tuple[int, ...], duplicate: Any) -> SharedRing:
    return SharedRing(shape, duplicate.detach())
