"""The progress of a run, and the text of its progress line.

The line shows only numbers that each step already has on the host, so that no step waits for a device.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tarflow_scale.config.train import TrainingConfig
from tarflow_scale.training.checkpoint import TrainState
from tarflow_scale.training.objective import Values
from tarflow_scale.training.spikes import LossHistory

__all__ = ["Progress", "progress_line"]

_SHOWN_STEPS = 20
"""Number of steps over which the progress line averages the loss."""
_GIB = 1024**3


@dataclass
class Progress:
    """The progress of a run; the mutable counterpart of `TrainState`."""

    losses: LossHistory
    images_seen: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    num_replaced: int = 0
    sums: Values = (0.0,)
    """Sums of the objective's figures over the steps since the last line of the log; the first is the loss."""
    loss_steps: int = 0
    roll_backs: int = 0
    seconds: float = 0.0
    started: float = field(default_factory=time.monotonic)
    recent: deque[Values] = field(default_factory=lambda: deque(maxlen=_SHOWN_STEPS))
    """Figures of the last steps since the process started; only for the progress line."""
    held_out: Values | None = None
    """Figures of the last validation since the process started."""

    @property
    def elapsed(self) -> float:
        """Seconds of training so far, over all starts."""
        return self.seconds + time.monotonic() - self.started

    @classmethod
    def of(cls, state: TrainState, training: TrainingConfig) -> "Progress":
        """The progress stored in the state of a checkpoint."""
        return cls(
            losses=LossHistory(training.spike, state.recent_losses),
            images_seen=state.images_seen,
            skipped_steps=state.skipped_steps,
            skipped_in_a_row=state.skipped_in_a_row,
            num_replaced=state.num_replaced,
            sums=(state.loss_sum, *state.figure_sums),
            loss_steps=state.loss_steps,
            roll_backs=state.roll_backs,
            seconds=state.seconds,
        )

    def take(self, values: Values) -> None:
        """Count a step: the means of the objective's figures over all ranks."""
        self.skipped_in_a_row = 0
        self.sums = _sum([self.sums, values]) if self.loss_steps else values
        self.loss_steps += 1
        self.losses.add(values[0])
        self.recent.append(values)

    def means(self) -> Values | None:
        """Means of the figures over the steps since the last call; None if there were no steps."""
        sums, num = self.sums, self.loss_steps
        self.sums, self.loss_steps = (0.0,) * len(sums), 0
        return tuple(total / num for total in sums) if num else None


def _sum(rows: Sequence[Values]) -> Values:
    return tuple(map(sum, zip(*rows, strict=True)))


def progress_line(
    progress: Progress,
    text: Callable[[Values], str],
    learning_rate: float,
    gradient_norm: float,
    speed: dict[str, float | None],
    memory_bytes: int,
) -> tuple[str, str]:
    """The text of a progress line, and a shorter text for a progress bar.

    Args:
        progress: progress of the run.
        text: function that turns the objective's figures into text.
        learning_rate: rate of the last step.
        gradient_norm: norm of the gradient of the last step, before clipping.
        speed: result of `tarflow_scale.training.meter.Meter.figures`.
        memory_bytes: peak memory of this rank.
    """
    brief: list[str] = []
    if progress.recent:
        brief.append(text(tuple(total / len(progress.recent) for total in _sum(progress.recent))))
    if progress.held_out is not None:
        brief.append(f"held out {text(progress.held_out)} (averaged weights)")
    mfu, waiting = speed["mfu"], speed["data_wait_fraction"]
    details = [
        *([] if mfu is None else [f"MFU {mfu:.0%}"]),
        f"learning rate {learning_rate:.2g}",
        f"gradient norm {gradient_norm:.3g}" if math.isfinite(gradient_norm) else "gradient not finite",
        f"waiting for data {waiting or 0.0:.0%}",
        f"{memory_bytes / _GIB:.2f} GiB per rank",
        *([f"{progress.skipped_steps} steps skipped"] if progress.skipped_steps else []),
    ]
    return ", ".join([*brief, *details]), ", ".join(brief)
