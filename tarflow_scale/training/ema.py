"""Exponential moving average of the weights, kept where the fp32 masters are kept.

At ZeRO 1 to 3 each rank averages its own partition; at stage 0, where every rank holds all weights, rank r averages
slice r. So the average costs 4 bytes per parameter divided by the number of ranks, and no communication. It is
gathered, parameter by parameter, only to be saved, exported or sampled from.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from tarflow_scale.distributed import all_reduce_sum, rank, world_size
from tarflow_scale.training.engine import Engine
from tarflow_scale.training.schedule import average_decay

__all__ = ["WeightAverage"]


class WeightAverage:
    """The average of the weights of ``engine``, starting at their present values.

    Args:
        engine: the engine.
        half_life_images: half-life; shorter at the start of training, see `average_decay`.
    """

    def __init__(self, engine: Engine, half_life_images: int) -> None:
        self._engine = engine
        self._half_life = half_life_images
        self._own = [_Slice.of(flat) for flat in engine.masters()] if engine.stage == 0 else None
        self._averages = [view.clone() for view in self._views()]

    @torch.no_grad()
    def update(self, images_seen: int, step_images: int) -> None:
        """Move towards the weights after a step of ``step_images`` that ended at ``images_seen``."""
        decay = average_decay(images_seen, step_images, self._half_life)
        for average, weights in zip(self._averages, self._views(), strict=True):
            average.lerp_(weights, 1 - decay)

    def full(self) -> Iterator[tuple[str, Tensor]]:
        """Name and whole average of every parameter, one at a time; all ranks must iterate to the end."""
        if self._own is None:
            with self._engine.exchanged(self._averages):
                for name in self._engine.names:
                    yield name, self._engine.full_weight(name)
            return
        for name, own, average in zip(self._engine.names, self._own, self._averages, strict=True):
            whole = torch.zeros_like(self._engine.full_weight(name))
            whole.view(-1)[own.start : own.stop] = average
            yield name, all_reduce_sum(whole)

    def load(self, averages: Iterator[tuple[str, Tensor]]) -> None:
        """Overwrite the average of every parameter with whole tensors by name."""
        if self._own is None:
            with self._engine.exchanged(self._averages):
                for name, value in averages:
                    self._engine.set_master(name, value)
            return
        places = {name: i for i, name in enumerate(self._engine.names)}
        for name, value in averages:
            own = self._own[places[name]]
            self._averages[places[name]].copy_(value.reshape(-1)[own.start : own.stop])

    def _views(self) -> list[Tensor]:
        masters = self._engine.masters()
        if self._own is None:
            return masters
        return [master.view(-1)[own.start : own.stop] for master, own in zip(masters, self._own, strict=True)]


class _Slice:
    """This rank's part ``[start, stop)`` of a flattened tensor that every rank holds whole."""

    def __init__(self, start: int, stop: int) -> None:
        self.start = start
        self.stop = stop

    @classmethod
    def of(cls, tensor: Tensor) -> "_Slice":
        share = -(-tensor.numel() // world_size())
        start = min(rank() * share, tensor.numel())
        return cls(start, min(start + share, tensor.numel()))
