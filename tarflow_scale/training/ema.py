"""Exponential moving averages of the weights, divided among ranks like the fp32 masters.

At ZeRO 1 to 3 each rank averages its own partition; at stage 0, where every rank has all weights, rank r averages slice
r. So each average takes ``4 * parameters / ranks`` bytes on each rank, and updates need no communication. An average is
gathered only for saving, export, validation and sampling, one parameter at a time.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from tarflow_scale.runtime.distributed import all_reduce_sum, rank, world_size
from tarflow_scale.training.engine import Engine
from tarflow_scale.training.schedule import average_decay

__all__ = ["WeightAverages"]


class WeightAverages:
    """Averages of the weights of ``engine``, initialized with the current weights.

    Args:
        engine: the engine.
        half_lives_images: half-life of each average, in images. `average_decay` shortens it at the start of training.
    """

    def __init__(self, engine: Engine, half_lives_images: Sequence[int]) -> None:
        self.half_lives = tuple(half_lives_images)
        self._engine = engine
        self._own = [_own_part(master) for master in engine.masters()] if engine.stage == 0 else None
        self._averages = {half_life: [view.clone() for view in self._views()] for half_life in self.half_lives}

    @torch.no_grad()
    def update(self, images_seen: int, step_images: int) -> None:
        """Update all averages after a step of ``step_images`` that ended at ``images_seen``."""
        views = self._views()
        for half_life, averages in self._averages.items():
            decay = average_decay(images_seen, step_images, half_life)
            torch._foreach_lerp_(averages, views, 1 - decay)  # pyright: ignore[reportPrivateUsage]

    @property
    def num_bytes(self) -> int:
        """Memory in bytes of all averages on this rank."""
        return sum(view.numel() * view.element_size() for averages in self._averages.values() for view in averages)

    def full(self, half_life: int | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and the complete average of each parameter; all ranks must iterate to the end.

        Args:
            half_life: half-life of the average; None selects the first average.
        """
        averages = self._averages[half_life or self.half_lives[0]]
        if self._own is None:
            with self._engine.exchanged(averages):
                for name in self._engine.names:
                    yield name, self._engine.full_weight(name)
            return
        for name, own, average in zip(self._engine.names, self._own, averages, strict=True):
            whole = torch.zeros_like(self._engine.full_weight(name))
            whole.view(-1)[own] = average
            yield name, all_reduce_sum(whole)

    def load(self, half_life: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Overwrite one average with complete tensors by parameter name; all ranks must call."""
        averages = self._averages[half_life]
        if self._own is None:
            with self._engine.exchanged(averages):
                for name, value in weights:
                    self._engine.set_master(name, value)
            return
        places = {name: i for i, name in enumerate(self._engine.names)}
        for name, value in weights:
            i = places[name]
            averages[i].copy_(value.reshape(-1)[self._own[i]])

    def _views(self) -> list[Tensor]:
        masters = self._engine.masters()
        if self._own is None:
            return masters
        return [master.view(-1)[own] for master, own in zip(masters, self._own, strict=True)]


def _own_part(tensor: Tensor) -> slice:
    """This rank's slice of a flattened tensor that is complete on every rank."""
    share = -(-tensor.numel() // world_size())
    start = min(rank() * share, tensor.numel())
    return slice(start, min(start + share, tensor.numel()))
