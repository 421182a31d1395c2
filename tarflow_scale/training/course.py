"""Where a run stands: the checkpoint of its folder that it goes on from, and its learning rate there and after."""

import math
from dataclasses import dataclass
from typing import Any

from tarflow_scale.config.train import TrainConfig
from tarflow_scale.errors import UserError
from tarflow_scale.records import changes
from tarflow_scale.training import checkpoint
from tarflow_scale.training.checkpoint import TrainState
from tarflow_scale.training.schedule import learning_rate_fraction, rate_change

__all__ = ["Course"]


@dataclass(frozen=True)
class Course:
    """A run from its first image to its last.

    Args:
        config: of the run.
        run: what must not change between this run and its continuation.
    """

    config: TrainConfig
    run: dict[str, Any]

    @property
    def total_images(self) -> int:
        """Images of the run, rounded up to whole steps."""
        step_images = self.config.training.global_batch_size
        return -(-self.config.training.total_images // step_images) * step_images

    @property
    def checkpoint_paths(self) -> tuple[str, ...]:
        """Folders of checkpoints, the run's own first."""
        own, upload = f"{self.config.logging.path}/checkpoints", self.config.checkpoint.upload_path
        return (own,) if upload is None else (own, upload)

    def rate_at(self, images_seen: int) -> float:
        """AdamW's learning rate in the step that comes after so many images."""
        fraction = learning_rate_fraction(images_seen, self.total_images, self.config.schedule)
        return self.config.optimizer.peak_lr * fraction

    def latest(self, reads_files: bool = True) -> tuple[str, TrainState] | None:
        """Folder and state of the checkpoint that the run goes on from; None where it begins.

        Args:
            reads_files: whether a checkpoint with a damaged file is passed over, which takes reading all of it.

        Raises:
            UserError: the run folder holds another or a longer run.
        """
        found = checkpoint.find_latest(*self.checkpoint_paths, reads_files=reads_files)
        if found is None:
            return None
        state, path = found[1], self.config.logging.path
        if changed := changes(state.run, self.run):
            raise UserError(
                f"the run folder {path} holds another run ({changed}); choose another logging.path or delete it"
            )
        if state.images_seen > self.total_images:
            raise UserError(
                f"training.total_images must not lie before the checkpoint (got {self.total_images} and "
                f"{state.images_seen}); raise it or choose another logging.path"
            )
        return found

    def begins(self, found: tuple[str, TrainState] | None) -> str:
        """In words, where the run begins, given what `latest` found."""
        if found is None:
            return "at the first image, the run folder has no checkpoint"
        done = found[1].images_seen == self.total_images
        return f"after {found[1].images_seen:,} images, from {found[0]}" + ("; nothing to train" if done else "")

    def rate_change(self, state: TrainState) -> str | None:
        """What to tell where the run goes on from ``state`` at another rate than it would have had."""
        before, now = state.learning_rate, self.rate_at(state.images_seen)
        if state.images_seen == self.total_images or before is None or math.isclose(before, now, rel_tol=1e-6):
            return None
        earlier = checkpoint.newest_at_rate(self.checkpoint_paths[0], self.rate_at)
        newer = earlier and f"all checkpoints newer than {earlier} in {' and '.join(self.checkpoint_paths)}"
        return rate_change(state.images_seen, before, now, self.config.schedule, newer)
