"""Validation during training: the negative log-likelihood of held-out images under averaged weights.

Each rank takes a range of the images. Every rank makes the same number of forward passes, because at ZeRO stage 3 each
pass gathers weights. A rank without images left runs the pass on an arbitrary image and ignores the result, so each
image counts once. Noise depends only on the sample, so it is the same in every validation.
"""

from dataclasses import dataclass

import numpy as np
import torch

from tarflow_scale.config.train import ValidationConfig
from tarflow_scale.errors import DataError
from tarflow_scale.records import PixelFormat
from tarflow_scale.runtime.distributed import all_reduce_sum, rank, world_size
from tarflow_scale.shards.manifest import Manifest
from tarflow_scale.shards.reader import ShardSet
from tarflow_scale.training.ema import WeightAverages
from tarflow_scale.training.engine import Engine, MicroBatch
from tarflow_scale.training.noise import conditions, model_input

__all__ = ["Validation"]

_NOISE_SEED = 0x76616C6964
"""Seed of the noise. It is the same for all runs, so that their losses can be compared."""


@dataclass(frozen=True)
class Validation:
    """The held-out images of a run.

    Args:
        shards: the data set.
        every_images: number of training images between two validations.
        num_images: number of images that are used, from the start of the data set.
        batch_size: number of images per forward pass.
        pixels: conversion of stored pixels to floats.
        conditional: whether the flow takes labels or other conditions.
    """

    shards: ShardSet
    every_images: int
    num_images: int
    batch_size: int
    pixels: PixelFormat
    conditional: bool

    @classmethod
    def open(
        cls,
        config: ValidationConfig,
        like: Manifest,
        data_path: str,
        batch_size: int,
        pixels: PixelFormat,
        conditional: bool,
    ) -> "Validation":
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
        return cls(shards, config.every_images, num_images, batch_size, pixels, conditional)

    def nats_per_dim(self, engine: Engine, averages: WeightAverages) -> float:
        """Mean negative log-likelihood of the images in nats per dimension, equal on all ranks; all ranks must call."""
        share = -(-self.num_images // world_size())
        low = min(rank() * share, self.num_images)
        high = min(low + share, self.num_images)
        total = torch.zeros((), dtype=torch.float64, device=engine.device)
        with engine.borrowing(averages.full()):
            for start in range(low, low + share, self.batch_size):
                num = max(0, min(start + self.batch_size, high) - start)
                # A rank without images left passes any image, so that all ranks make the same number of passes.
                numbers = np.arange(start, start + num) if num else np.zeros(1, dtype=np.int64)
                batch = self.shards.take(numbers)
                x = model_input(batch, self.pixels, _NOISE_SEED, engine.device)
                y = conditions(batch, 0.0, 0, engine.device) if self.conditional else None
                total += engine.nats(MicroBatch(x, y))[:num].double().sum()
        return float(all_reduce_sum(total)) / (self.num_images * engine.num_dims)
