"""Generation of images from sample indices.

Latent i depends only on (seed, i). It is decoded by the inverse of the flow with guidance, optionally denoised, checked
by `guard`, and stored as pixels. `decode` is TarFlow's decoder with a key/value cache; it decodes token by token, or in
parallel within a given tolerance. `network` and `windows` are its parts, and `calibration` measures the fastest chunk
sizes on a device. `sweep` draws the same latents under several settings. Nothing here writes files.
"""

from tarflow_scale.flows.latents import latents
from tarflow_scale.sampling.guard import Drawn, Quality, guarded
from tarflow_scale.sampling.labels import balanced_labels
from tarflow_scale.sampling.sampler import Sampler, calibrate

__all__ = ["Drawn", "Quality", "Sampler", "balanced_labels", "calibrate", "guarded", "latents"]
