"""From sample indices to images."""

from tarflow_scale.flows.latents import latents
from tarflow_scale.sampling.labels import balanced_labels
from tarflow_scale.sampling.sampler import Sampler, calibrate

__all__ = ["Sampler", "balanced_labels", "calibrate", "latents"]
