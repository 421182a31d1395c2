"""From sample indices to images."""

from tarflow_scale.sampling.latents import balanced_labels, latents
from tarflow_scale.sampling.sampler import Sampler

__all__ = ["Sampler", "balanced_labels", "latents"]
