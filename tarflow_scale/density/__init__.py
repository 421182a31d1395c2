"""Uses of an exact likelihood.

`image_bits_per_dim` and `image_nats` score images in memory, `classify` and `marginal_log_prob` sum over labels,
`interpolated` and `edited` move images in latent space, `fit_posterior` does variational inference;
`tarflow_scale.density.anomaly` computes the scores of the verb ``score``; `surprise` and `picture` draw pictures.
Nothing here reads or writes files. Input that does not fit the flow raises ValueError.
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
from tarflow_scale.density.variational import ImportanceDiagnostics, Posterior, fit_posterior

__all__ = [
    "ImportanceDiagnostics",
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
