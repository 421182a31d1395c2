"""What an exact likelihood is good for."""

from tarflow_scale.density.variational import ImportanceReport, Posterior, fit_posterior

__all__ = ["ImportanceReport", "Posterior", "fit_posterior"]
