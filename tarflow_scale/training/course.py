"""The course of a run: its length, the checkpoint from which it continues, and its learning rate."""

import math
from dataclasses import dataclass
from typing import Any

from tarflow_scale.config.train import ScheduleConfig, TrainingConfig
from tarflow_scale.errors import UserError
from tarflow_scale.records import changes
from tarflow_scale.training import checkpoint
from tarflow_scale.training.checkpoint import TrainState
from tarflow_scale.training.schedule import learning_rate_fraction, rate_change

__all__ = ["Course"]


@dataclass(frozen=True)
class Course:
    """Length, checkpoints and learning rate of a run.

    Args:
        folder: the run folder, ``logging.path``.
        upload_path: a second folder or URL with checkpoints, or None.
        training, schedule: sections of the configuration.
        peak_learning_rate: peak of AdamW's learning rate.
        run: the settings that must not change when the run continues.
    """

    folder: str
    upload_path: str | None
    training: TrainingConfig
    schedule: ScheduleConfig
    peak_learning_rate: float
    run: dict[str, Any]

    @property
    def total_images(self) -> int:
        """Number of training images of the run, rounded up to whole steps."""
        step_images = self.training.global_batch_size
        return -(-self.training.total_images // step_images) * step_images

    @property
    def checkpoint_paths(self) -> tuple[str, ...]:
        """Folders of checkpoints; the folder in the run folder is first."""
        own = f"{self.folder}/checkpoints"
        return (own,) if self.upload_path is None else (own, self.upload_path)

    def rate_fraction_at(self, images_seen: int) -> float:
        """Learning rate of the step after ``images_seen`` images, as a fraction of its peak."""
        return learning_rate_fraction(images_seen, self.total_images, self.schedule)

    def rate_at(self, images_seen: int) -> float:
        """AdamW's learning rate in the step after ``images_seen`` images."""
        return self.peak_learning_rate * self.rate_fraction_at(images_seen)

    def latest(self, reads_files: bool = True) -> tuple[str, TrainState] | None:
        """Folder and state of the checkpoint from which the run continues; None for a new run.

        Args:
            reads_files: whether to read all files of a checkpoint, and to skip it if one is damaged.

        Raises:
            UserError: the run folder holds another run, or the checkpoint lies beyond ``total_images``.
        """
        latest = checkpoint.find_latest(*self.checkpoint_paths, reads_files=reads_files)
        if latest is None:
            return None
        _, state = latest
        if changed := changes(state.run, self.run):
            raise UserError(
                f"the run folder {self.folder} holds another run ({changed}); choose another logging.path or delete "
                f"the folder"
            )
        if state.images_seen > self.total_images:
            raise UserError(
                f"training.total_images must be at least the number of images that the checkpoint has seen "
                f"(got {self.total_images} and {state.images_seen}); raise training.total_images or choose another "
                f"logging.path"
            )
        return latest

    def begins(self, latest: tuple[str, TrainState] | None) -> str:
        """A text for the user that says where the run begins, given the result of `latest`."""
        if latest is None:
            return "at the first image, because the run folder has no checkpoint"
        folder, state = latest
        done = "; nothing to train" if state.images_seen == self.total_images else ""
        return f"after {state.images_seen:,} images, from {folder}{done}"

    def rate_change(self, state: TrainState) -> str | None:
        """A message if the run continues from ``state`` at a learning rate other than the stored rate; else None."""
        before, now = state.learning_rate, self.rate_at(state.images_seen)
        if state.images_seen == self.total_images or before is None or math.isclose(before, now, rel_tol=1e-6):
            return None
        earlier = checkpoint.newest_at_rate(self.checkpoint_paths[0], self.rate_at)
        newer = earlier and f"all checkpoints newer than {earlier} in {' and '.join(self.checkpoint_paths)}"
        return rate_change(state.images_seen, before, now, self.schedule, newer)
