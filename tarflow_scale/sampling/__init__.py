"""From sample indices to images.

Latent i is drawn from (seed, i) alone, decoded with the flow's exact inverse (`decode`, with a key/value cache for
TarFlow; `sweep` and `windows` decode it in parallel to a stated tolerance), guided, maybe denoised, checked by `guard`,
and stored as pixels. `plan` holds which decoding a device was measured with. Nothing here writes files: the verbs do.
"""

from tarflow_scale.flows.latents import latents
from tarflow_scale.sampling.guard import Drawn, Quality, guarded
from tarflow_scale.sampling.labels import balanced_labels
from tarflow_scale.sampling.sampler import Sampler, calibrate

__all__ = ["Drawn", "Quality", "Sampler", "balanced_labels", "calibrate", "guarded", "latents"]
