"""Counter-based random numbers: a draw depends on its purpose, seed and indices, never on the process or the time.

Every random quantity of the pipeline is a pure function of a purpose and a few integers (seed, epoch, sample index,
...) computed with Philox 4x64 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). Rank, worker,
batch size and restarts therefore cannot change it. Draws are made on the CPU, so they are the same for every device.
"""

from enum import IntEnum

import numpy as np
from numpy.random.bit_generator import ISeedSequence
from numpy.typing import DTypeLike, NDArray

__all__ = ["Purpose", "generator", "integer", "permutation", "raw_words"]


class Purpose(IntEnum):
    """Purpose of a stream of random numbers; streams of different purposes never overlap.

    Stored results depend on the value of each member: append new members, and never change a value.
    """

    SHARD_ORDER = 1
    BLOCK_ORDER = 2
    SAMPLE_ORDER = 3
    NOISE = 4
    LABEL_DROP = 5
    LATENT = 6
    SPLIT = 7
    PACK_ORDER = 8
    BITS_PER_DIM_NOISE = 9
    REFERENCE_SUBSET = 10
    BASELINE = 11
    ROTATION = 12
    AUGMENTATION = 13
    LABEL = 14


def generator(purpose: Purpose, seed: int, index: int = 0, lane: int = 0) -> np.random.Generator:
    """The random generator for ``(purpose, seed, index, lane)``; seed, index and lane are integers in [0, 2^64)."""
    return np.random.Generator(_philox(purpose, seed, index, lane))


def permutation(size: int, purpose: Purpose, seed: int, index: int = 0, lane: int = 0) -> NDArray[np.int64]:
    """A random permutation of ``range(size)``.

    A stable sort of raw 64-bit words gives the permutation. NumPy guarantees that the stream of these words never
    changes (NEP 19), so an upgrade of NumPy keeps the order of samples.
    """
    words = _philox(purpose, seed, index, lane).random_raw(size)
    return np.argsort(words, kind="stable")


def integer(below: int, purpose: Purpose, seed: int, index: int = 0, lane: int = 0) -> int:
    """A random integer in ``[0, below)``, from one raw 64-bit word; its bias, ``below / 2^64``, is negligible."""
    return int(_philox(purpose, seed, index, lane).random_raw()) % below


def raw_words(num: int, purpose: Purpose, seed: int, index: int = 0, lane: int = 0) -> list[int]:
    """``num`` random integers in ``[0, 2^64)``. NumPy guarantees that their stream never changes (NEP 19)."""
    return [int(word) for word in _philox(purpose, seed, index, lane).random_raw(num)]


def _philox(purpose: Purpose, seed: int, index: int, lane: int) -> np.random.Philox:
    counter = np.array([0, 0, lane, int(purpose)], dtype=np.uint64)
    return np.random.Philox(_Key(seed, index), counter=counter)  # pyright: ignore[reportArgumentType]


class _Key(ISeedSequence):
    """A Philox key. It gives the same numbers as ``Philox(key=...)`` but is faster, because it draws no entropy."""

    def __init__(self, *words: int) -> None:
        self._words = np.array(words, dtype=np.uint64)

    def generate_state(self, n_words: int, dtype: DTypeLike = np.uint64) -> NDArray[np.uint64]:
        return self._words
