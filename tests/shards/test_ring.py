"""The shared memory of a rank and its loader processes."""

import contextlib
import multiprocessing
import pickle
from pathlib import Path

import numpy as np
import pytest

from tarflow_scale.shards.ring import SharedRing


def fill(ring: SharedRing, value: int) -> None:
    ring.arrays[1] = value


def test_a_spawned_process_writes_what_its_parent_reads() -> None:
    ring = SharedRing((3, 2, 5))
    assert (ring.arrays == 0).all()
    child = multiprocessing.get_context("spawn").Process(target=fill, args=(ring, 7))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert ring.arrays[:, 0, 0].tolist() == [0, 7, 0]
    ring.close()


def descriptors() -> int:
    """Open file descriptors of rings; other threads of the test session may have other descriptors."""
    number = 0
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            number += "tarflow-scale-batches" in str(entry.readlink())
    return number


def test_memory_outlives_the_descriptor_and_no_descriptor_is_left() -> None:
    before = descriptors()
    ring = SharedRing((1000,))
    same = pickle.loads(pickle.dumps(ring))
    ring.close()
    same.close()
    arrays = ring.arrays, same.arrays
    del ring, same
    arrays[0][:] = np.arange(1000) % 256
    assert (arrays[1] == np.arange(1000) % 256).all()
    del arrays
    assert descriptors() == before


def test_memory_that_is_not_there_is_an_error() -> None:
    with pytest.raises((OSError, ValueError, OverflowError)):
        SharedRing((1 << 62,))
