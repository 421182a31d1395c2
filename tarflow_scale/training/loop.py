"""The training loop: batches in order, one step each, and what happens between steps, in plain order.

Progress is counted in images. Whatever is random about a sample is drawn from (seed, epoch, sample); dropout masks
come from a generator that is seeded anew at every step from (seed, images seen, rank). Hence the run has no random
state, and one that is killed and resumed on the same number of ranks repeats the lost steps bit for bit.
"""

import math
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tarflow_scale import distributed, storage, telemetry
from tarflow_scale.config import CheckpointConfig, LoggingConfig, OptimizerConfig, ScheduleConfig, TrainingConfig
from tarflow_scale.errors import UserError
from tarflow_scale.records import PixelFormat
from tarflow_scale.shards.loader import Loader
from tarflow_scale.shards.quarantine import check_share
from tarflow_scale.shards.reader import Batch
from tarflow_scale.training import checkpoint
from tarflow_scale.training.checkpoint import TrainState
from tarflow_scale.training.ema import WeightAverage
from tarflow_scale.training.engine import Engine, MicroBatch, StepResult
from tarflow_scale.training.noise import dropped_labels, noisy_images
from tarflow_scale.training.schedule import learning_rate

__all__ = ["Interrupted", "Loop", "Preview", "Progress", "check_shared"]

Preview = Callable[[dict[str, Tensor], int], None]
"""Called on rank 0 with the averaged weights by name and the images seen."""


class Interrupted(UserError):
    """The run was asked to stop, saved a checkpoint, and can be resumed."""


@dataclass
class Progress:
    """How far a run is; the mutable counterpart of `TrainState`."""

    images_seen: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    num_replaced: int = 0
    loss_sum: float = 0.0
    loss_steps: int = 0
    seconds: float = 0.0
    started: float = field(default_factory=time.monotonic)

    @property
    def elapsed(self) -> float:
        """Seconds of training so far, over all its parts."""
        return self.seconds + time.monotonic() - self.started


@dataclass(frozen=True)
class Loop:
    """Everything one run needs.

    Args:
        engine: the flow under DeepSpeed.
        average: its moving average.
        reader: this rank's batches.
        pixels: how stored pixels become floats.
        class_conditional: whether the flow takes labels.
        run: what must not change between this run and its continuation.
        training, optimizer, schedule, checkpoints, logging: the sections.
        preview: draws a sample grid.
    """

    engine: Engine
    average: WeightAverage
    reader: Loader
    pixels: PixelFormat
    class_conditional: bool
    run: dict[str, Any]
    training: TrainingConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    checkpoints: CheckpointConfig
    logging: LoggingConfig
    preview: Preview

    @property
    def total_images(self) -> int:
        """Images of the run, rounded up to whole steps."""
        return _whole_steps(self.training.total_images, self.training.global_batch_size)

    def fit(self, progress: Progress) -> None:
        """Train from ``progress``, which moves along, to ``training.total_images``.

        Raises:
            UserError: too many steps in a row were not finite.
            Interrupted: SIGTERM or SIGUSR1 came; a checkpoint was saved.
        """
        stop = _StopSignal()
        log_path = Path(self.logging.path) / "log.jsonl"
        main = distributed.is_main()
        opened = telemetry.JsonLog(log_path, keep_until_images=progress.images_seen) if main else nullcontext()
        batches = closing(self.reader.batches(progress.images_seen))
        with opened as log, self._bar(progress, main) as bar, batches as batches:
            while progress.images_seen < self.total_images:
                before = progress.images_seen
                batch = next(batches)
                result = self._step(batch, progress)
                stopping = self._agree(result, stop.received, batch.num_replaced, progress)
                now = progress.images_seen
                bar.update(now - before)
                done = now >= self.total_images
                if done or _crossed(before, now, self.logging.every_images):
                    self._log(log, bar, result, progress)
                if done or stopping or _crossed(before, now, self.checkpoints.every_images):
                    self._save(progress)
                if done or _crossed(before, now, self.logging.preview_every_images):
                    self._preview(now)
                if stopping and not done:
                    raise Interrupted(
                        f"stopped by a signal after {now} images (checkpoint saved); run it again to go on"
                    )

    def _step(self, batch: Batch, progress: Progress) -> StepResult:
        seen = progress.images_seen
        torch.manual_seed(_dropout_seed(self.training.seed, seen, distributed.rank()))
        rate = learning_rate(seen, self.total_images, self.optimizer, self.schedule)
        result = self.engine.step(self._micro_batches(batch), rate)
        progress.images_seen += self.training.global_batch_size
        if not result.skipped:
            self.average.update(progress.images_seen, self.training.global_batch_size)
        return result

    def _micro_batches(self, batch: Batch) -> Iterator[MicroBatch]:
        device, seed, size = self.engine.device, self.training.seed, self.training.micro_batch_size
        for low in range(0, len(batch), size):
            part = batch[low : low + size]
            x = noisy_images(part, self.pixels, seed, device)
            y = dropped_labels(part, self.training.label_drop, seed).to(device) if self.class_conditional else None
            yield MicroBatch(x, y)

    def _agree(self, result: StepResult, signalled: bool, num_replaced: int, progress: Progress) -> bool:
        """Sum over ranks what all must know; True when any rank was asked to stop."""
        own = [result.nats_per_dim, float(signalled), float(num_replaced)]
        facts = torch.tensor(own, dtype=torch.float64, device=self.engine.device)
        loss, signals, replaced = distributed.all_reduce_sum(facts).tolist()
        progress.num_replaced += round(replaced)
        allowed = self.reader.config.max_corrupt_fraction
        check_share(progress.num_replaced, progress.images_seen, allowed, self.logging.path)
        if result.skipped:
            progress.skipped_steps += 1
            progress.skipped_in_a_row += 1
            if progress.skipped_in_a_row > self.training.max_skipped_steps:
                raise UserError(
                    f"loss or gradient was not finite in {progress.skipped_in_a_row} steps in a row, the last at "
                    f"{progress.images_seen} images (allowed: {self.training.max_skipped_steps}); lower "
                    f"optimizer.peak_lr, or resume from an older checkpoint"
                )
        else:
            progress.skipped_in_a_row = 0
            progress.loss_sum += loss / distributed.world_size()
            progress.loss_steps += 1
        return signals > 0

    def _log(self, log: telemetry.JsonLog | None, bar: Any, result: StepResult, progress: Progress) -> None:
        loss = progress.loss_sum / progress.loss_steps if progress.loss_steps else None
        progress.loss_sum, progress.loss_steps = 0.0, 0
        images = progress.images_seen
        record: dict[str, Any] = {
            "images": images,
            "nats_per_dim": loss,
            "bits_per_dim": self._bits(loss),
            "learning_rate": learning_rate(images, self.total_images, self.optimizer, self.schedule),
            "gradient_norm": result.gradient_norm if math.isfinite(result.gradient_norm) else None,
            "skipped_steps": progress.skipped_steps,
            "replaced_samples": progress.num_replaced,
            "images_per_second": images / progress.elapsed,
            "peak_memory_bytes": telemetry.peak_memory_bytes(),
            "seconds": progress.elapsed,
        }
        if log is not None:
            log.write(record)
        if loss is not None:
            name, value = ("nats/dim", loss) if record["bits_per_dim"] is None else ("bits/dim", record["bits_per_dim"])
            bar.set_postfix_str(f"{name} {value:.3f}", refresh=False)

    def _bits(self, nats_per_dim: float | None) -> float | None:
        """Training loss in bits/dim; only uniform dequantisation has any."""
        if nats_per_dim is None or self.pixels.noise != "uniform":
            return None
        return nats_per_dim / math.log(2) + self.pixels.bit_depth - 1

    def _save(self, progress: Progress) -> None:
        state = TrainState(
            images_seen=progress.images_seen,
            num_steps=self.engine.num_steps,
            skipped_steps=progress.skipped_steps,
            skipped_in_a_row=progress.skipped_in_a_row,
            num_replaced=progress.num_replaced,
            loss_sum=progress.loss_sum,
            loss_steps=progress.loss_steps,
            seconds=progress.elapsed,
            run=self.run,
        )
        checkpoint.save(self._checkpoint_path, self.engine, self.average, state, self.checkpoints.keep_last)

    def _preview(self, images_seen: int) -> None:
        weights = self.averaged_weights()
        if distributed.is_main():
            self.preview(weights, images_seen)

    def averaged_weights(self) -> dict[str, Tensor]:
        """The moving average and the buffers by name, whole, on rank 0; empty elsewhere. All ranks must call."""
        main = distributed.is_main()
        weights = {name: full.cpu().clone() for name, full in self.average.full() if main}
        return weights | {name: buffer.cpu() for name, buffer in self.engine.buffers().items() if main}

    def resume(self) -> Progress:
        """Restore the latest checkpoint, if there is one; rank 0 finds it, so that all ranks take the same.

        Raises:
            UserError: the run folder holds another or a longer run, or is not one folder for all ranks.
        """
        check_shared(self.logging.path, self.engine.device)
        found = distributed.from_main(lambda: checkpoint.find_latest(self._checkpoint_path))
        if found is None:
            return Progress()
        folder, state = found
        changed = sorted(key for key in self.run if self.run[key] != state.run.get(key))
        if changed:
            raise UserError(
                f"the run folder {self.logging.path} holds another run ({', '.join(changed)} differ); "
                f"choose another logging.path or delete it"
            )
        if state.images_seen > self.total_images:
            raise UserError(
                f"training.total_images must not lie before the checkpoint (got {self.total_images} and "
                f"{state.images_seen}); raise it or choose another logging.path"
            )
        checkpoint.load(folder, self.engine, self.average, self._prime)
        return Progress(
            images_seen=state.images_seen,
            skipped_steps=state.skipped_steps,
            skipped_in_a_row=state.skipped_in_a_row,
            num_replaced=state.num_replaced,
            loss_sum=state.loss_sum,
            loss_steps=state.loss_steps,
            seconds=state.seconds,
        )

    def _prime(self) -> StepResult:
        """One step on the first batch, at rate 0: it makes DeepSpeed allocate what is then overwritten."""
        return self.engine.step(self._micro_batches(self.reader.first()), learning_rate=0.0)

    def _bar(self, progress: Progress, main: bool) -> Any:
        return telemetry.progress_bar(self.total_images, "train", initial=progress.images_seen, enabled=main)

    @property
    def _checkpoint_path(self) -> str:
        return f"{self.logging.path}/checkpoints"


def check_shared(path: str, device: torch.device) -> None:
    """All ranks must see one run folder, or only some would find the checkpoints; rank 0 leaves a mark to look for.

    Raises:
        UserError: on every rank, when some rank does not see it.
    """
    if distributed.world_size() == 1:
        return
    name = f".shared-{distributed.from_main(lambda: _leave_mark(path))}"
    unseen = torch.tensor([float(not storage.exists(storage.join(path, name)))], device=device)
    num_unseen = int(distributed.all_reduce_sum(unseen).item())
    if distributed.is_main():
        storage.remove(storage.join(path, name))
    if num_unseen:
        raise UserError(
            f"logging.path must be one folder for all ranks (got {num_unseen} that do not see {path} of rank 0); "
            f"put it on storage that all nodes share"
        )


def _leave_mark(path: str) -> str:
    mark = uuid.uuid4().hex
    storage.write_bytes(storage.join(path, f".shared-{mark}"), b"seen")
    return mark


class _StopSignal:
    """Set by SIGTERM or SIGUSR1 (what schedulers send before they preempt a job)."""

    def __init__(self) -> None:
        self.received = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._receive)

    def _receive(self, *_: object) -> None:
        self.received = True


def _dropout_seed(seed: int, images_seen: int, rank: int) -> int:
    return int(np.random.SeedSequence((seed, images_seen, rank)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _whole_steps(images: int, step_images: int) -> int:
    return -(-images // step_images) * step_images


def _crossed(before: int, now: int, every: int) -> bool:
    """Whether a multiple of ``every`` lies in (before, now]."""
    return now // every > before // every
