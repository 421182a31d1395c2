"""The progress of a run, and the text of its progress line.

The line shows only numbers that each step already has on the host, so that no step waits for a device.
"""

import math
import time
from collections import deque
from dataclasses import dataclass, field

from tarflow_scale.config.train import TrainingConfig
from tarflow_scale.records import PixelFormat
from tarflow_scale.training.checkpoint import TrainState
from tarflow_scale.training.spikes import LossHistory

__all__ = ["Progress", "bits_per_dim", "progress_line"]

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
    loss_sum: float = 0.0
    loss_steps: int = 0
    roll_backs: int = 0
    seconds: float = 0.0
    started: float = field(default_factory=time.monotonic)
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=_SHOWN_STEPS))
    """Losses of the last steps since the process started, in nats per dimension; only for the progress line."""
    held_out: float | None = None
    """Loss of the last validation since the process started, in nats per dimension."""

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
            loss_sum=state.loss_sum,
            loss_steps=state.loss_steps,
            roll_backs=state.roll_backs,
            seconds=state.seconds,
        )

    def take(self, loss: float) -> None:
        """Count the loss of a step: the mean over all ranks, in nats per dimension."""
        self.skipped_in_a_row = 0
        self.loss_sum += loss
        self.loss_steps += 1
        self.losses.add(loss)
        self.recent.append(loss)


def bits_per_dim(nats_per_dim: float | None, pixels: PixelFormat) -> float | None:
    """Convert a loss to bits/dim; None if there is no loss, or no uniform dequantization."""
    if nats_per_dim is None or pixels.noise != "uniform":
        return None
    return nats_per_dim / math.log(2) + pixels.bit_depth - 1


def progress_line(
    progress: Progress,
    pixels: PixelFormat,
    learning_rate: float,
    gradient_norm: float,
    speed: dict[str, float | None],
    memory_bytes: int,
) -> tuple[str, str]:
    """The text of a progress line, and a shorter text for a progress bar.

    Args:
        progress: progress of the run.
        pixels: conversion of stored pixels to floats, which decides the unit of the loss.
        learning_rate: rate of the last step.
        gradient_norm: norm of the gradient of the last step, before clipping.
        speed: result of `tarflow_scale.training.meter.Meter.figures`.
        memory_bytes: peak memory of this rank.
    """

    def loss(nats: float) -> str:
        bits = bits_per_dim(nats, pixels)
        return f"{nats:.3f} nats/dim" if bits is None else f"{bits:.3f} bits/dim"

    brief: list[str] = []
    if progress.recent:
        brief.append(loss(sum(progress.recent) / len(progress.recent)))
    if progress.held_out is not None:
        brief.append(f"held out {loss(progress.held_out)} (averaged weights)")
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
