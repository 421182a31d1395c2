"""Mix data sets. Weights determine how many slots of the global batch each fills. Each has its own order of samples."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from tarflow_scale.config.data import DataConfig
from tarflow_scale.errors import DataError
from tarflow_scale.shards.manifest import Manifest
from tarflow_scale.shards.order import Line, OrderSpec
from tarflow_scale.shards.reader import ShardSet

__all__ = ["Mix", "MixPart", "open_mix"]

_SEED_STEP = 0x9E3779B97F4A7C15
"""Difference between the seeds of successive data sets, so that data sets with equal shards have different orders."""


@dataclass(frozen=True)
class MixPart:
    """One data set of a mix.

    Args:
        shards: the data set.
        spec: order of its samples; ``spec.num_slots`` is the number of slots that the data set fills.
        first_slot: index of its first slot in the global batch.
        first_sample: index of its first sample among the samples of all data sets.
        weight: weight of the data set in the configuration.
    """

    shards: ShardSet
    spec: OrderSpec
    first_slot: int
    first_sample: int
    weight: float


@dataclass(frozen=True)
class Mix:
    """All data sets of a run, in the order of the configuration."""

    parts: tuple[MixPart, ...]

    @property
    def manifest(self) -> Manifest:
        """Manifest of the first data set; the others have the same event type and classes."""
        return self.parts[0].shards.manifest

    @property
    def num_slots(self) -> int:
        """The global batch size."""
        return sum(part.spec.num_slots for part in self.parts)

    @property
    def num_images(self) -> int:
        """Number of samples in all data sets."""
        return sum(part.spec.num_samples for part in self.parts)

    @property
    def bytes_per_sample(self) -> int:
        """Mean number of stored bytes per sample in the shard where this mean is largest, rounded up."""
        return max(-(-shard.bytes // shard.samples) for part in self.parts for shard in part.shards.manifest.shards)

    def part_of(self, slot: int) -> tuple[MixPart, int]:
        """The data set that fills a slot of the global batch, and the number of the slot within this data set."""
        part = next(part for part in reversed(self.parts) if part.first_slot <= slot)
        return part, slot - part.first_slot


@lru_cache(maxsize=8)
def line_of(spec: OrderSpec, epoch: int) -> Line:
    """The samples of an epoch as a `Line`, which all slots of a data set share."""
    return Line(spec, epoch)


def open_mix(config: DataConfig, global_batch_size: int, seed: int) -> Mix:
    """Open the data sets of a run and divide the slots of its global batch among them.

    Raises:
        DataError: a data set cannot be read, has another event type or other classes than the first, or gets no slot.
    """
    sets = [ShardSet(config.path, config.verify), *(ShardSet(part.path, config.verify) for part in config.mix)]
    for other in sets[1:]:
        _check_alike(sets[0], other)
    weights = np.array([config.weight, *(part.weight for part in config.mix)])
    parts: list[MixPart] = []
    first_slot = first_sample = 0
    for number, (shards, slots) in enumerate(zip(sets, share_slots(weights, global_batch_size), strict=True)):
        if slots == 0:
            raise DataError(
                f"every data set of a mix must have a sample in the global batch (got none for {shards.path}, with "
                f"weight {weights[number]:g} of {weights.sum():g} and training.global_batch_size={global_batch_size}); "
                f"raise training.global_batch_size"
            )
        spec = OrderSpec(
            samples_per_shard=tuple(shard.samples for shard in shards.manifest.shards),
            num_slots=slots,
            shuffle_block=config.shuffle_block,
            seed=(seed + number * _SEED_STEP) % 2**64,
        )
        parts.append(MixPart(shards, spec, first_slot, first_sample, float(weights[number])))
        first_slot += slots
        first_sample += spec.num_samples
    return Mix(tuple(parts))


def share_slots(weights: NDArray[np.float64], num_slots: int) -> list[int]:
    """Divide slots in proportion to weights, by the largest remainder method; ties go to the earlier weight."""
    exact = weights / weights.sum() * num_slots
    slots = np.floor(exact).astype(int)
    order = np.argsort(-(exact - slots), kind="stable")
    slots[order[: num_slots - slots.sum()]] += 1
    return slots.tolist()


def _check_alike(first: ShardSet, other: ShardSet) -> None:
    for name, rule in (("event", "kind of samples"), ("class_names", "class_names")):
        wanted, got = getattr(first.manifest, name), getattr(other.manifest, name)
        if wanted != got:
            raise DataError(
                f"all data sets of a mix must have the same {rule} (got {wanted} in {first.path} and {got} in "
                f"{other.path}); pack them with the same settings"
            )
