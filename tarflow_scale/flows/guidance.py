"""Guidance of Gaussian predictions: those with the condition move away from those without it.

With the scale w, a predicted mean m and deviation s, and m', s' without the condition:

* ``linear`` (TarFlow, arXiv 2412.06329): m + w (m - m') and log s + w (log s - log s').
* ``gaussian`` (STARFlow, arXiv 2506.06276): the density proportional to p^(1 + w) / p'^w. With r = min(s / s', 1)^2 and
  d = 1 + w - w r, its mean is ((1 + w) m - w r m') / d and its deviation is s / sqrt(d). The limit of r at 1 keeps d
  positive.
"""

import torch
from torch import Tensor

from tarflow_scale.config.sampling import Guidance

__all__ = ["guided"]


def guided(
    log_scale: Tensor | None,
    mean: Tensor,
    weak_log_scale: Tensor | None,
    weak_mean: Tensor,
    strength: float | Tensor,
    guidance: Guidance,
) -> tuple[Tensor | None, Tensor]:
    """Log-scale and mean with guidance; all arguments and results have the same shape.

    Args:
        log_scale: log of the deviation; None if all deviations are fixed.
        mean: mean.
        weak_log_scale: the log-scale that is predicted without the condition.
        weak_mean: the mean that is predicted without the condition.
        strength: the scale w, or a tensor that broadcasts to the result.
        guidance: rule, and the parameters that it changes.
    """
    if guidance.rule == "linear" or log_scale is None or weak_log_scale is None:
        if guidance.what != "log_scale":
            mean = mean + strength * (mean - weak_mean)
        if guidance.what != "mean" and log_scale is not None and weak_log_scale is not None:
            log_scale = log_scale + strength * (log_scale - weak_log_scale)
        return log_scale, mean
    ratio = torch.exp(2 * (log_scale - weak_log_scale).clamp(max=0))
    divisor = 1 + strength - strength * ratio
    mean = ((1 + strength) * mean - strength * ratio * weak_mean) / divisor
    return log_scale - 0.5 * torch.log(divisor), mean
