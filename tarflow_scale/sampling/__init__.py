"""From sample indices to images."""

from tarflow_scale.flows.latents import latents
from tarflow_scale.sampling.guard import Drawn, Quality, guarded
from tarflow_scale.sampling.labels import balanced_labels
from tarflow_scale.sampling.sampler import Sampler, calibrate

__all__ = ["Drawn", "Quality", "Sampler", "balanced_labels", "calibrate", "guarded", "latents"]
