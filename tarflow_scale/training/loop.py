"""The training loop: one step for each batch, and logging, validation, checkpoints and previews between steps.

Progress is counted in images. All random numbers of a sample come from (seed, epoch, sample); dropout masks come from a
generator that every step seeds with (seed, images seen, rank). So a run has no random state, and a run that is killed
and resumed on the same number of ranks repeats the lost steps bit for bit.
"""

import math
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tarflow_scale.config.train import CheckpointConfig, LoggingConfig, TrainingConfig
from tarflow_scale.errors import Interrupted, UserError
from tarflow_scale.runtime import console, distributed, provenance
from tarflow_scale.shards.loader import Loader
from tarflow_scale.shards.quarantine import check_share
from tarflow_scale.shards.reader import Batch
from tarflow_scale.training import checkpoint, run_log
from tarflow_scale.training.checkpoint import TrainState
from tarflow_scale.training.course import Course
from tarflow_scale.training.ema import WeightAverages
from tarflow_scale.training.engine import Engine, StepResult
from tarflow_scale.training.meter import Meter
from tarflow_scale.training.objective import MicroBatch, Values
from tarflow_scale.training.progress import Progress, progress_line
from tarflow_scale.training.spikes import LossHistory
from tarflow_scale.training.upload import Uploader
from tarflow_scale.training.validation import Validation

__all__ = ["Loop", "Preview"]

Preview = Callable[[dict[str, Tensor], int], None]
"""A function that is called on rank 0 with the averaged weights by name and the number of images seen."""
_SAME_CTRL_C_SECONDS = 1.0
"""Signals within this time count as one Ctrl-C, because terminal and launcher may both send it to a rank."""


@dataclass(frozen=True)
class Loop:
    """The training loop, with the objects that it uses.

    Args:
        engine: trains the model.
        averages: moving averages of the weights.
        reader: reads this rank's batches.
        course: length, checkpoints and learning rate of the run.
        training, checkpoints, logging: sections of the configuration.
        validation: held-out images, or None.
        meter: measures speed.
        preview: draws a picture.
    """

    engine: Engine
    averages: WeightAverages
    reader: Loader
    course: Course
    training: TrainingConfig
    checkpoints: CheckpointConfig
    logging: LoggingConfig
    validation: Validation | None
    meter: Meter
    preview: Preview

    def fit(self, progress: Progress, log: run_log.Log) -> None:
        """Train to ``training.total_images``.

        Args:
            progress: progress at which training begins; it is updated.
            log: function that writes a record of measurements.

        Raises:
            UserError: too many steps in a row were not finite, the loss jumped too often, or a checkpoint cannot be
                written.
            Interrupted: a signal or the time limit stopped the run; a checkpoint was saved.
        """
        stop = _StopSignal(self.training.max_seconds)
        bar = console.ProgressBar(
            self.course.total_images, "train", initial=progress.images_seen, enabled=distributed.is_main()
        )
        uploads = Uploader(self.checkpoints)
        batches = self.reader.batches(progress.images_seen)
        with bar, closing(batches):
            while progress.images_seen < self.course.total_images:
                before = progress.images_seen
                with self.meter.spending("data"):
                    batch = next(batches)
                result = self._step(batch, progress)
                diagnostics = (
                    self.engine.objective.diagnostics()
                )  # before validation and previews, which overwrite them
                stopping = self._agree(result, stop.reason, batch.num_replaced, progress)
                now = progress.images_seen
                self.meter.stepped(now - before)
                done = now >= self.course.total_images
                validated = self._validate(before, now, done, progress)
                self._show(bar, result, progress)
                bar.update(now - before)
                if done or validated is not None or _crossed(before, now, self.logging.every_images):
                    self._log(log, result, progress, validated, diagnostics)
                if done or stopping or _crossed(before, now, self.checkpoints.every_images):
                    self._save(progress, uploads)
                if done or _crossed(before, now, self.logging.preview_every_images):
                    self._preview(now)
                if stopping and not done:
                    uploads.wait()
                    raise Interrupted(
                        f"stopped by {stopping} after {now:,} of {self.course.total_images:,} images; a checkpoint is "
                        f"saved, and the same command continues the run; the model is registered when the run is "
                        f"finished"
                    )
        uploads.wait()

    def _step(self, batch: Batch, progress: Progress) -> StepResult:
        seen = progress.images_seen
        torch.manual_seed(_dropout_seed(self.training.seed, seen, distributed.rank()))
        rate = self.course.rate_fraction_at(seen)
        reject = None if self.training.spike.rule == "off" else progress.losses.is_spike
        result = self.engine.step(self._micro_batches(batch), rate, reject)
        progress.images_seen += self.training.global_batch_size
        if not result.skipped:
            self.averages.update(progress.images_seen, self.training.global_batch_size)
        return result

    def _micro_batches(self, batch: Batch) -> Iterator[MicroBatch]:
        engine, size = self.engine, self.training.micro_batch_size
        for low in range(0, len(batch), size):
            part = batch[low : low + size]
            yield engine.objective.inputs(part, self.training.seed, engine.device, training=True)

    def _agree(self, result: StepResult, reason: str, num_replaced: int, progress: Progress) -> str:
        """Add up figures, stop requests and replaced samples of all ranks. Returns the reason to stop, or ""."""
        own = [float(bool(reason)), float(num_replaced), *result.values]
        sums = distributed.all_reduce_sum(torch.tensor(own, dtype=torch.float64, device=self.engine.device))
        stops, replaced, *totals = sums.tolist()
        values = tuple(total / distributed.world_size() for total in totals)
        progress.num_replaced += round(replaced)
        allowed = self.reader.config.max_corrupt_fraction
        check_share(progress.num_replaced, progress.images_seen, allowed, self.logging.path)
        if result.rejected:
            self._after_spike(values[0], progress)
        elif result.skipped:
            progress.skipped_steps += 1
            progress.skipped_in_a_row += 1
            if progress.skipped_in_a_row > self.training.max_skipped_steps:
                raise UserError(
                    f"loss or gradient was not finite in {progress.skipped_in_a_row} steps in a row, the last at "
                    f"{progress.images_seen} images (training.max_skipped_steps={self.training.max_skipped_steps}); "
                    f"lower optimizer.peak_lr, or resume from an older checkpoint"
                )
        else:
            progress.take(values)
        return (reason or "another rank") if stops > 0 else ""

    def _after_spike(self, loss: float, progress: Progress) -> None:
        """Count a rejected step; its samples are skipped. Rule ``roll_back`` also restores the latest checkpoint."""
        progress.skipped_steps += 1
        if distributed.is_main():
            warnings.warn(
                f"the loss jumped to {loss:.4f} nats/dim at {progress.images_seen} images "
                f"(training.spike.rule={self.training.spike.rule})",
                stacklevel=2,
            )
        if self.training.spike.rule != "roll_back":
            return
        progress.roll_backs += 1
        if progress.roll_backs > self.training.spike.max_roll_backs:
            raise UserError(
                f"the run must not roll back more often than training.spike.max_roll_backs (got {progress.roll_backs} "
                f"jumps of the loss, and {self.training.spike.max_roll_backs} allowed); lower optimizer.peak_lr"
            )
        latest = distributed.from_main(lambda: checkpoint.find_latest(*self.course.checkpoint_paths))
        if latest is not None:  # without a checkpoint the step is only skipped
            folder, state = latest
            checkpoint.load(folder, self.engine, self.averages, self._prime)
            progress.losses = LossHistory(self.training.spike, state.recent_losses)

    def _show(self, bar: console.ProgressBar, result: StepResult, progress: Progress) -> None:
        memory = provenance.peak_memory_bytes(self.engine.device.type)
        rate = self.course.rate_at(progress.images_seen)
        text, speed = self.engine.objective.text, self.meter.figures()
        bar.tell(*progress_line(progress, text, rate, result.gradient_norm, speed, memory))

    def _log(
        self,
        log: run_log.Log,
        result: StepResult,
        progress: Progress,
        validated: Values | None,
        diagnostics: dict[str, float],
    ) -> None:
        figures = self.engine.objective.record
        record: dict[str, Any] = {
            "images": progress.images_seen,
            **figures(progress.means()),
            "learning_rate": self.course.rate_at(progress.images_seen),
            "gradient_norm": result.gradient_norm if math.isfinite(result.gradient_norm) else None,
            "skipped_steps": progress.skipped_steps,
            "roll_backs": progress.roll_backs,
            "replaced_samples": progress.num_replaced,
            "peak_memory_bytes": provenance.peak_memory_bytes(self.engine.device.type),
            "seconds": progress.elapsed,
            **self.meter.report(),
            **diagnostics,
        }
        if validated is not None:
            record |= {f"validation_{name}": value for name, value in figures(validated).items()}
        log(record)

    def _validate(self, before: int, now: int, done: bool, progress: Progress) -> Values | None:
        """Means of the objective's figures over held-out images; None if validation is not due."""
        if self.validation is None or not (done or _crossed(before, now, self.validation.every_images)):
            return None
        with self.meter.spending("validation"):
            progress.held_out = self.validation.means(self.engine, self.averages)
        return progress.held_out

    def _save(self, progress: Progress, uploads: Uploader) -> None:
        with self.meter.spending("checkpoint"):
            state = TrainState(
                images_seen=progress.images_seen,
                num_steps=self.engine.num_steps,
                skipped_steps=progress.skipped_steps,
                skipped_in_a_row=progress.skipped_in_a_row,
                num_replaced=progress.num_replaced,
                loss_sum=progress.sums[0],
                figure_sums=progress.sums[1:],
                loss_steps=progress.loss_steps,
                seconds=progress.elapsed,
                recent_losses=progress.losses.losses,
                roll_backs=progress.roll_backs,
                learning_rate=self.course.rate_at(progress.images_seen),
                run=self.course.run,
            )
            uploads.wait()
            path = self.course.checkpoint_paths[0]
            uploads.start(*checkpoint.save(path, self.engine, self.averages, state, self.checkpoints))

    def _preview(self, images_seen: int) -> None:
        with self.meter.spending("preview"):
            weights = self.averaged_weights()
            if distributed.is_main():
                self.preview(weights, images_seen)
            distributed.barrier()

    def averaged_weights(self, half_life: int | None = None) -> dict[str, Tensor]:
        """The averaged weights and the buffers on rank 0, by name; empty on other ranks. All ranks must call.

        Args:
            half_life: half-life of the average; None selects the first average.
        """
        main = distributed.is_main()
        weights = {name: full.cpu().clone() for name, full in self.averages.full(half_life) if main}
        return weights | {name: buffer.cpu() for name, buffer in self.engine.buffers().items() if main}

    def resume(self) -> Progress:
        """Restore the latest checkpoint, if there is one. Rank 0 selects it, so that all ranks load the same.

        Raises:
            UserError: the run folder holds another run, or the checkpoint lies beyond ``training.total_images``.
        """
        latest = distributed.from_main(self.course.latest)
        if latest is None:
            return Progress(LossHistory(self.training.spike))
        folder, state = latest
        checkpoint.load(folder, self.engine, self.averages, self._prime)
        if distributed.is_main() and (line := self.course.rate_change(state)):
            print(line, flush=True)
        return Progress.of(state, self.training)

    def _prime(self) -> StepResult:
        """Make one step on the first batch with learning rate 0, so that DeepSpeed allocates its state."""
        return self.engine.step(self._micro_batches(self.reader.first()), rate=0.0)


class _StopSignal:
    """Records why to stop: SIGTERM or SIGUSR1 (schedulers send them before they preempt a job), Ctrl-C or a time limit.

    Rank 0 reports a signal at once, because the current step may take minutes. A second Ctrl-C ends the run without a
    checkpoint, but only if it comes more than `_SAME_CTRL_C_SECONDS` after the first.
    """

    def __init__(self, max_seconds: float | None) -> None:
        self._received = ""
        self._interrupted = math.inf
        self._deadline = math.inf if max_seconds is None else time.monotonic() + max_seconds
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._receive)

    @property
    def reason(self) -> str:
        """The reason in words; empty if there is none."""
        return self._received or ("training.max_seconds" if time.monotonic() > self._deadline else "")

    def _receive(self, number: int, _: object) -> None:
        if not self._received and distributed.is_main():
            again = "; Ctrl-C again ends the run without a checkpoint" if number == signal.SIGINT else ""
            text = f"\n{signal.Signals(number).name}: the run stops after this step and saves a checkpoint{again}\n"
            with suppress(OSError):  # not through the stream, because the signal may interrupt a write to it
                os.write(2, text.encode())
        self._received = signal.Signals(number).name
        if number != signal.SIGINT:
            return
        now = time.monotonic()
        if now > self._interrupted + _SAME_CTRL_C_SECONDS:
            raise KeyboardInterrupt
        self._interrupted = min(self._interrupted, now)


def _dropout_seed(seed: int, images_seen: int, rank: int) -> int:
    return int(np.random.SeedSequence((seed, images_seen, rank)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _crossed(before: int, now: int, every: int) -> bool:
    """Whether a multiple of ``every`` lies in (before, now]."""
    return now // every > before // every
