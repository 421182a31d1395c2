"""What an exact likelihood is good for."""

from tarflow_scale.density.conditional import (
    attribute_direction,
    classify,
    edited,
    interpolated,
    log_prob_of_labels,
    marginal_log_prob,
)
from tarflow_scale.density.variational import ImportanceReport, Posterior, fit_posterior

__all__ = [
    "ImportanceReport",
    "Posterior",
    "attribute_direction",
    "classify",
    "edited",
    "fit_posterior",
    "interpolated",
    "log_prob_of_labels",
    "marginal_log_prob",
]
