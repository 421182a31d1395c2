"""The order in which samples are read, as a pure function of the seed and the epoch.

The shards of an epoch are permuted and laid end to end. This line of samples is rotated by a random offset and cut into
G equal stretches, where G is the global batch size. Slot j of each global batch takes its samples from stretch j, in
blocks of ``shuffle_block`` samples: the blocks are visited in a random order, and the samples of a block are permuted.
The first block that slot j visits is shorter by floor(j * shuffle_block / G), so that the slots do not all need a new
block at the same step.

Properties:

* The state of a loader is one integer, the number of images seen. Step t of an epoch takes element t of every slot.
* The global batches do not depend on the world size or the number of workers: each rank owns consecutive slots.
* Every rank takes the same number of steps. An epoch leaves out at most G - 1 samples, which differ
  from epoch to epoch because of the rotation.
* A block is one contiguous range of the line. It needs one or a few range reads, and no byte is read twice in an epoch.

Proof (n samples, G slots, stretches of s = floor(n / G) samples):

* *Once per epoch.* The line is a bijection of positions to samples: a permutation of shards laid end to end and rotated
  modulo n. Stretch j has the positions [j s, (j + 1) s); the stretches are disjoint and have n - (n mod G) positions.
  The blocks of a slot cut its stretch without overlap, and both permutations, of blocks and inside blocks, are
  bijections. So every position is visited once, and n mod G < G samples are left out.
* *The same for every world size.* Element t of slot j is a function of (seed, epoch, j, t) and the data set alone. Rank
  r of R owns the slots [r G / R, (r + 1) G / R) in order, so the batches of all ranks together have the slots 0 to
  G - 1 in order, for every R. Worker processes divide the slots of a rank in the same way.
* *Resume is exact.* After i images (a multiple of G), the next step is t = i / G. It is in epoch floor(t / s) and takes
  element t mod s of every slot. There is no other state, so a loader that starts at this step continues as if it had
  not stopped. It first reads one block for each slot, the block that contains the element.
* *Equal steps.* Every slot has s elements, so every rank has s steps per epoch, for shards of any sizes.

`tests/shards/test_order.py` and `tests/shards/test_loader.py` check these properties with random data sets.

All lengths and positions count samples. A position is on the line of the epoch; `Line` converts it to a shard and an
index in the shard.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from tarflow_scale.errors import DataError
from tarflow_scale.randomness import Purpose, integer, permutation

__all__ = ["Line", "OrderSpec", "SlotWalk", "steps_per_epoch"]


@dataclass(frozen=True)
class OrderSpec:
    """The quantities that determine the order of samples.

    Args:
        samples_per_shard: number of samples of each shard, in the order of the manifest.
        num_slots: G, the global batch size; in a mix of data sets, the number of its slots that this data set fills.
        shuffle_block: number of samples in a block.
        seed: seed of all permutations.
    """

    samples_per_shard: tuple[int, ...]
    num_slots: int
    shuffle_block: int
    seed: int

    def __post_init__(self) -> None:
        if self.num_slots > self.num_samples:
            raise DataError(
                f"the global batch must not take more samples from a data set than it has (got {self.num_slots}, and "
                f"the data set has {self.num_samples}); lower training.global_batch_size"
            )

    @property
    def num_samples(self) -> int:
        """Number of samples of the data set."""
        return sum(self.samples_per_shard)


def steps_per_epoch(spec: OrderSpec) -> int:
    """Number of global batches in an epoch, which is the length of a stretch."""
    return spec.num_samples // spec.num_slots


class Line:
    """The samples of one epoch in a line: the shards are permuted, laid end to end, and rotated by a random offset."""

    def __init__(self, spec: OrderSpec, epoch: int) -> None:
        self.spec = spec
        self.epoch = epoch
        self._shards = permutation(len(spec.samples_per_shard), Purpose.SHARD_ORDER, spec.seed, epoch)
        lengths = np.asarray(spec.samples_per_shard, dtype=np.int64)[self._shards]
        self._starts = np.concatenate([[0], np.cumsum(lengths)])
        self._rotation = integer(spec.num_samples, Purpose.ROTATION, spec.seed, epoch)

    def runs(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Convert positions ``[start, stop)`` to runs ``(shard number, first index in the shard, last index + 1)``."""
        runs: list[tuple[int, int, int]] = []
        while start < stop:
            absolute = (start + self._rotation) % self.spec.num_samples
            place = int(np.searchsorted(self._starts, absolute, side="right")) - 1
            first, end = absolute - int(self._starts[place]), int(self._starts[place + 1])
            length = min(stop - start, end - absolute)
            runs.append((int(self._shards[place]), first, first + length))
            start += length
        return runs


@dataclass(frozen=True)
class SlotWalk:
    """The positions that one slot visits in one epoch, block by block.

    Args:
        spec: the quantities that determine the order.
        epoch: number of the epoch.
        slot: number of the slot, in [0, G).
    """

    spec: OrderSpec
    epoch: int
    slot: int

    @cached_property
    def block_lengths(self) -> NDArray[np.int64]:
        """Lengths of the blocks, in visiting order; their sum is the length of the stretch."""
        block, length = self.spec.shuffle_block, steps_per_epoch(self.spec)
        first = min(block - (self.slot * block) // self.spec.num_slots, length)
        full, rest = divmod(length - first, block)
        return np.array([first, *[block] * full, *([rest] if rest else [])], dtype=np.int64)

    @cached_property
    def visit_starts(self) -> NDArray[np.int64]:
        """Step of the epoch at which each visited block begins, and the last step + 1; ``(num_blocks + 1,)``."""
        return np.concatenate([[0], np.cumsum(self.block_lengths)])

    @cached_property
    def _line_starts(self) -> NDArray[np.int64]:
        """Position on the line at which each block begins, in visiting order."""
        lengths = self.block_lengths
        order = permutation(len(lengths), Purpose.BLOCK_ORDER, self.spec.seed, self.epoch, self.slot)
        starts = np.empty_like(lengths)
        starts[order] = np.concatenate([[0], np.cumsum(lengths[order])[:-1]])
        return starts + self.slot * steps_per_epoch(self.spec)

    def block_at(self, step: int) -> int:
        """Number of the block that contains ``step``; blocks are numbered in visiting order."""
        return int(np.searchsorted(self.visit_starts, step, side="right") - 1)

    def block_range(self, block: int) -> tuple[int, int]:
        """Range ``[start, stop)`` of the positions of a block on the line; blocks are numbered in visiting order."""
        start = int(self._line_starts[block])
        return start, start + int(self.block_lengths[block])

    def block_order(self, block: int) -> NDArray[np.int64]:
        """The order in which the samples of a block are taken: a permutation of ``range(length)``."""
        lane = (self.slot << 32) | block
        return permutation(int(self.block_lengths[block]), Purpose.SAMPLE_ORDER, self.spec.seed, self.epoch, lane)
