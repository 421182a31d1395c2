"""The order of samples: slot streams, a pure function of (seed, epoch).

The shards of an epoch are permuted and laid end to end; this line is rotated by a random offset and cut into G equal
stretches, where G is the global batch size. Slot j of every global batch walks stretch j in blocks of ``shuffle_block``
samples; the blocks are visited in a random order and permuted inside. The first block that slot j visits is shorter by
floor(j * shuffle_block / G), so that the slots do not all refill on the same step.

What follows:

* The state of a loader is one integer, the images seen. Step t of an epoch takes element t of every slot.
* Whatever the world size or the number of workers, the global batches are the same: a rank owns a run of slots.
* Every rank takes the same number of steps. An epoch leaves out at most G - 1 samples; the rotation changes which.
* A block is one contiguous range of the line, hence one or a few range reads, and no byte is read twice in an epoch.

Why (n samples, G slots, stretches of s = floor(n / G) samples):

* *Once an epoch.* The line is a bijection of positions to samples: a permutation of shards laid end to end and rotated
  modulo n. Stretch j is the positions [j s, (j + 1) s): disjoint for different j, G s = n - (n mod G) > n - G of them.
  The blocks of a slot cut its stretch without overlap, and both permutations, of blocks and inside blocks, are
  bijections. So every position is visited once, and n mod G < G samples are left out.
* *The same for every world size.* Element t of slot j is a function of (seed, epoch, j, t) and the data set alone. Rank
  r of R owns slots [r G / R, (r + 1) G / R), in order, and a batch is the slots in order; joined over ranks it is the
  slots 0 to G - 1, whatever R is. Worker processes divide a rank's run in the same way.
* *Resume is exact.* After i images (a multiple of G) the next step is t = i / G, its epoch floor(t / s), its element
  t mod s. There is no other state, so starting at this step equals having arrived there. Each slot must read the block
  that holds the element: at most one block a slot.
* *Equal steps.* Every slot has s elements, hence every rank has s steps an epoch, whatever the sizes of shards.

`tests/shards/test_order.py` and `tests/shards/test_loader.py` check these as properties of random data sets.

Units: samples. Positions are on the epoch's line; ``Line`` turns them into (shard, index in shard).
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
    """Everything that the order depends on.

    Args:
        samples_per_shard: number of samples of each shard, in the manifest's order.
        num_slots: G, the global batch size.
        shuffle_block: samples of a block.
        seed: the seed.
    """

    samples_per_shard: tuple[int, ...]
    num_slots: int
    shuffle_block: int
    seed: int

    def __post_init__(self) -> None:
        if self.num_slots > self.num_samples:
            raise DataError(
                f"the global batch must not exceed the data set (got {self.num_slots} and {self.num_samples} samples); "
                f"lower training.global_batch_size"
            )

    @property
    def num_samples(self) -> int:
        """Samples of the data set."""
        return sum(self.samples_per_shard)


def steps_per_epoch(spec: OrderSpec) -> int:
    """Global batches of an epoch: the length of a stretch."""
    return spec.num_samples // spec.num_slots


class Line:
    """The shards of one epoch, permuted, laid end to end and rotated."""

    def __init__(self, spec: OrderSpec, epoch: int) -> None:
        self.spec = spec
        self.epoch = epoch
        self._shards = permutation(len(spec.samples_per_shard), Purpose.SHARD_ORDER, spec.seed, epoch)
        lengths = np.asarray(spec.samples_per_shard, dtype=np.int64)[self._shards]
        self._starts = np.concatenate([[0], np.cumsum(lengths)])
        self._rotation = integer(spec.num_samples, Purpose.ROTATION, spec.seed, epoch)

    def runs(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Line positions ``[start, stop)`` as runs ``(shard number, first index in it, index after the last)``."""
        runs: list[tuple[int, int, int]] = []
        while start < stop:
            absolute = (start + self._rotation) % self.spec.num_samples
            place = int(np.searchsorted(self._starts, absolute, side="right")) - 1
            first, end = absolute - int(self._starts[place]), int(self._starts[place + 1])
            length = min(stop - start, end - absolute)
            runs.append((int(self._shards[place]), first, first + length))
            start += length
        return runs


class SlotWalk:
    """The positions that one slot visits in one epoch, block by block.

    Args:
        spec: the order.
        epoch: the epoch.
        slot: j in [0, G).
    """

    def __init__(self, spec: OrderSpec, epoch: int, slot: int) -> None:
        self._spec = spec
        self._epoch = epoch
        self._slot = slot
        self._length = steps_per_epoch(spec)

    @cached_property
    def block_lengths(self) -> NDArray[np.int64]:
        """Lengths of the blocks in the order in which they are visited; they sum to the stretch."""
        block = self._spec.shuffle_block
        first = min(block - (self._slot * block) // self._spec.num_slots, self._length)
        full, rest = divmod(self._length - first, block)
        return np.array([first, *[block] * full, *([rest] if rest else [])], dtype=np.int64)

    @cached_property
    def visit_starts(self) -> NDArray[np.int64]:
        """Step of the epoch at which each visited block begins, and the end ``(num_blocks + 1,)``."""
        return np.concatenate([[0], np.cumsum(self.block_lengths)])

    @cached_property
    def _line_starts(self) -> NDArray[np.int64]:
        """Position on the line at which each visited block begins: the blocks lie in a random order."""
        lengths = self.block_lengths
        order = permutation(len(lengths), Purpose.BLOCK_ORDER, self._spec.seed, self._epoch, self._slot)
        starts = np.empty_like(lengths)
        starts[order] = np.concatenate([[0], np.cumsum(lengths[order])[:-1]])
        return starts + self._slot * self._length

    def block_at(self, step: int) -> int:
        """Number, in visiting order, of the block that holds ``step``."""
        return int(np.searchsorted(self.visit_starts, step, side="right") - 1)

    def block_range(self, block: int) -> tuple[int, int]:
        """The contiguous range ``[start, stop)`` of line positions of a visited block."""
        start = int(self._line_starts[block])
        return start, start + int(self.block_lengths[block])

    def block_order(self, block: int) -> NDArray[np.int64]:
        """The order in which the samples of a visited block are taken: a permutation of ``range(length)``."""
        lane = (self._slot << 32) | block
        return permutation(int(self.block_lengths[block]), Purpose.SAMPLE_ORDER, self._spec.seed, self._epoch, lane)
