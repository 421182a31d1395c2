"""Validation during training: the objective's figures on held-out images, with averaged weights.

Each rank takes a range of the images. Every rank makes the same number of forward passes, because at ZeRO stage 3 each
pass gathers weights. A rank without images left runs the pass on an arbitrary image and ignores the result, so each
image counts once. Noise depends only on the sample, so it is the same in every validation.
"""

from dataclasses import dataclass

import numpy as np
import torch

from tarflow_scale.config.train import ValidationConfig
from tarflow_scale.errors import DataError
from tarflow_scale.runtime.distributed import all_reduce_sum, rank, world_size
from tarflow_scale.shards.manifest import Manifest
from tarflow_scale.shards.reader import ShardSet
from tarflow_scale.training.ema import WeightAverages
from tarflow_scale.training.engine import Engine
from tarflow_scale.training.objective import Values

__all__ = ["NOISE_SEED", "Validation"]

NOISE_SEED = 0x76616C6964
"""Seed of the noise. It is the same for all runs, so that their losses can be compared."""


@dataclass(frozen=True)
class Validation:
    """The held-out images of a run.

    Args:
        shards: the data set.
        every_images: number of training images between two validations.
        num_images: number of images that are used, from the start of the data set.
        batch_size: number of images per forward pass.
    """

    shards: ShardSet
    every_images: int
    num_images: int
    batch_size: int

    @classmethod
    def open(cls, config: ValidationConfig, like: Manifest, data_path: str, batch_size: int) -> "Validation":
        """Open the data set.

        Raises:
            DataError: the data set cannot be read, or its classes or kind of samples differ from the training data
                (manifest ``like``, path ``data_path``).
        """
        shards = ShardSet(config.path, config.verify)
        for name, rule in (("event", "samples of the same kind"), ("class_names", "the same class_names")):
            wanted, got = getattr(like, name), getattr(shards.manifest, name)
            if wanted != got:
                raise DataError(
                    f"validation.path and data.path must have {rule} (got {got} in {config.path}, and {wanted} in "
                    f"{data_path}); set validation.path to a held-out split of the same data set"
                )
        available = shards.manifest.num_images
        num_images = min(available, config.num_images or available)
        return cls(shards, config.every_images, num_images, batch_size)

    def means(self, engine: Engine, averages: WeightAverages) -> Values:
        """Means of the objective's figures over the images, equal on all ranks; all ranks must call."""
        share = -(-self.num_images // world_size())
        low = min(rank() * share, self.num_images)
        high = min(low + share, self.num_images)
        total = torch.zeros(1, dtype=torch.float64, device=engine.device)
        with engine.borrowing(averages.full()):
            for start in range(low, low + share, self.batch_size):
                num = max(0, min(start + self.batch_size, high) - start)
                # A rank without images left passes any image, so that all ranks make the same number of passes.
                numbers = np.arange(start, start + num) if num else np.zeros(1, dtype=np.int64)
                inputs = engine.objective.inputs(self.shards.take(numbers), NOISE_SEED, engine.device, training=False)
                total = total + engine.figures(inputs)[:num].double().sum(dim=0)
        loss, *others = all_reduce_sum(total).tolist()
        return loss / (self.num_images * engine.objective.num_dims), *(figure / self.num_images for figure in others)
