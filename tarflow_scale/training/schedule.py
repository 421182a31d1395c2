"""Learning rate and moving-average decay as pure functions of images seen, so that neither has a state to lose."""

import math

from tarflow_scale.config import OptimizerConfig, ScheduleConfig

__all__ = ["average_decay", "learning_rate"]

_RAMP = 0.05
"""The half-life of the average is at most this fraction of the images seen, as in EDM (arXiv 2206.00364)."""


def learning_rate(images_seen: int, total_images: int, optimizer: OptimizerConfig, schedule: ScheduleConfig) -> float:
    """Linear warm-up from 0, then cosine from ``peak_lr`` to ``final_lr_fraction`` of it at ``total_images``."""
    if images_seen < schedule.warmup_images:
        return optimizer.peak_lr * images_seen / schedule.warmup_images
    progress = (images_seen - schedule.warmup_images) / max(1, total_images - schedule.warmup_images)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return optimizer.peak_lr * (schedule.final_lr_fraction + (1 - schedule.final_lr_fraction) * cosine)


def average_decay(images_seen: int, step_images: int, half_life_images: int) -> float:
    """Factor by which the average keeps its past in a step of ``step_images`` that ends at ``images_seen``."""
    half_life = min(half_life_images, _RAMP * images_seen)
    return 0.5 ** (step_images / half_life)
