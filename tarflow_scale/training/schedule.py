"""Learning rate and decay of moving averages, as pure functions of the number of images seen."""

import math

from tarflow_scale.config.train import ScheduleConfig

__all__ = ["average_decay", "learning_rate_fraction", "rate_change"]

_RAMP = 0.05
"""The half-life of an average is at most this fraction of the images seen, as in EDM (arXiv 2206.00364)."""


def learning_rate_fraction(images_seen: int, total_images: int, schedule: ScheduleConfig) -> float:
    """Learning rate as a fraction of its peak, in [0, 1].

    After a linear warm-up from 0, ``cosine`` decays to ``final_lr_fraction`` at ``total_images``, ``constant`` stays at
    the peak, and ``wsd`` stays at the peak, then decays linearly to ``final_lr_fraction`` over the last
    ``decay_images`` (Hu et al., "MiniCPM", arXiv 2404.06395).
    """
    if images_seen < schedule.warmup_images:
        return images_seen / schedule.warmup_images
    final = schedule.final_lr_fraction
    match schedule.kind:
        case "constant":
            return 1.0
        case "wsd":
            assert schedule.decay_images is not None
            left = min(1.0, max(0, total_images - images_seen) / schedule.decay_images)
            return final + (1 - final) * left
        case "cosine":
            progress = (images_seen - schedule.warmup_images) / max(1, total_images - schedule.warmup_images)
            return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def rate_change(images_seen: int, before: float, now: float, schedule: ScheduleConfig, newer: str | None) -> str:
    """A message for a run that continues at a learning rate other than the rate stored in its checkpoint.

    Args:
        images_seen: number of images at which the run continues.
        before: rate of the next step when the checkpoint was saved.
        now: rate of the next step under the current schedule.
        schedule: the current schedule.
        newer: text that names the checkpoints to delete: all that are newer than the last one at which both rates
            agree. None if the rates agree at no checkpoint.
    """
    rates = f"the learning rate at {images_seen:,} images was {before:.3g}, now {now:.3g}"
    line = f"continuing with another schedule: {rates}"
    if now < before:
        return line
    if newer is not None and schedule.kind == "wsd":
        advice = f"delete {newer} to continue without the jump"
    elif schedule.kind == "wsd":
        advice = "no checkpoint is old enough to continue without the jump"
    else:
        advice = "for runs that will be extended, use schedule.kind=wsd"
    return f"{line}; a higher rate makes the model worse at first ({advice})"


def average_decay(images_seen: int, step_images: int, half_life_images: int) -> float:
    """Weight of the old value when an average is updated at ``images_seen``, after a step of ``step_images``."""
    half_life = min(half_life_images, _RAMP * images_seen)
    return 0.5 ** (step_images / half_life)
