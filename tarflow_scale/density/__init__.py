"""What an exact likelihood is good for.

`image_bits_per_dim` and `image_nats` for images in memory, `classify` and `marginal_log_prob` over labels,
`interpolated` and `edited` between latents, `fit_posterior` for variational inference; `tarflow_scale.density.anomaly`
has the scores of the verb ``score``, `surprise` and `picture` draw. Nothing here reads or writes files; what does not
fit a flow is a ValueError.
"""

from tarflow_scale.density.conditional import (
    attribute_direction,
    classify,
    edited,
    interpolated,
    log_prob_of_labels,
    marginal_log_prob,
)
from tarflow_scale.density.pixels import image_bits_per_dim, image_nats, image_tensor
from tarflow_scale.density.variational import ImportanceReport, Posterior, fit_posterior

__all__ = [
    "ImportanceReport",
    "Posterior",
    "attribute_direction",
    "classify",
    "edited",
    "fit_posterior",
    "image_bits_per_dim",
    "image_nats",
    "image_tensor",
    "interpolated",
    "log_prob_of_labels",
    "marginal_log_prob",
]
