"""Detect spikes: a step is a spike if its loss exceeds the mean of the previous losses by more than a limit."""

from collections import deque
from collections.abc import Iterable

from tarflow_scale.config.train import SpikeConfig

__all__ = ["LossHistory"]


class LossHistory:
    """Losses of the last accepted steps, in nats per dimension.

    Args:
        config: the rule for spikes.
        losses: losses from a checkpoint, oldest first.
    """

    def __init__(self, config: SpikeConfig, losses: Iterable[float] = ()) -> None:
        self._config = config
        self._losses = deque(losses, maxlen=config.window_steps)

    @property
    def losses(self) -> tuple[float, ...]:
        """The losses, to be stored in a checkpoint."""
        return tuple(self._losses)

    def add(self, loss: float) -> None:
        """Add the loss of an accepted step."""
        if self._config.rule != "off":
            self._losses.append(loss)

    def is_spike(self, loss: float) -> bool:
        """Whether a loss exceeds the mean of the last losses by more than the limit; False if too few are known."""
        if self._config.rule == "off" or len(self._losses) < self._config.window_steps:
            return False
        return loss > sum(self._losses) / len(self._losses) + self._config.above_nats_per_dim
