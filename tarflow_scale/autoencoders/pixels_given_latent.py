"""log p(x | z): distributions of pixels around decoded values, with a scale for each channel.

Level k of n-bit pixels is the bin [2 k / 2^n - 1, 2 (k + 1) / 2^n - 1) on [-1, 1], as in uniform dequantization; the
first and the last bin extend to infinity. A bin has the probability F((high - m) / s) - F((low - m) / s), so that a
bound in bits/dim can be stated (PixelCNN++, arXiv 1701.05517, for the logistic distribution). A Laplace density has no
bins.
"""

import math
from typing import Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

__all__ = ["Likelihood", "log_bins", "log_density"]

Likelihood = Literal["logistic", "gaussian", "laplace"]
_LEAST = 1e-12
"""Least distance of the two ends of a bin, in scales; below, their difference is rounding."""


def log_bins(
    kind: Literal["logistic", "gaussian"],
    levels: UInt8[Tensor, "B K H W"],
    bit_depth: int,
    mean: Float[Tensor, "B K H W"],
    log_scale: Float[Tensor, " K"],
) -> Float[Tensor, " B"]:
    """Log probability of the levels of pixels, in nats, summed over an image.

    Args:
        kind: the distribution.
        levels: levels of pixels, 0 to 2^n - 1.
        bit_depth: bits n of a pixel.
        mean: decoded values on [-1, 1].
        log_scale: logarithm of the scale of each channel.
    """
    scale = log_scale.exp()[:, None, None]
    width = 2 / 2**bit_depth
    low = (width * levels.to(mean.dtype) - 1 - mean) / scale
    high = low + (width / scale).clamp(min=_LEAST)
    log_cdf, log_between = _DISTRIBUTIONS[kind]
    inside = log_between(low, high)
    last = 2**bit_depth - 1
    log_prob = torch.where(levels == 0, log_cdf(high), torch.where(levels == last, log_cdf(-low), inside))
    return log_prob.flatten(1).sum(dim=1)


def log_density(
    kind: Likelihood,
    x: Float[Tensor, "B K H W"],
    mean: Float[Tensor, "B K H W"],
    log_scale: Float[Tensor, " K"],
) -> Float[Tensor, " B"]:
    """Log density of pixels on [-1, 1] in nats, summed over an image; arguments as in `log_bins`."""
    log_scale = log_scale[:, None, None]
    distance = (x - mean) * torch.exp(-log_scale)
    match kind:
        case "gaussian":
            log_prob = -0.5 * (distance.square() + math.log(2 * math.pi))
        case "laplace":
            log_prob = -distance.abs() - math.log(2)
        case "logistic":
            log_prob = torch.nn.functional.logsigmoid(distance) + torch.nn.functional.logsigmoid(-distance)
    return (log_prob - log_scale).flatten(1).sum(dim=1)


def _log_between_logistic(low: Tensor, high: Tensor) -> Tensor:
    """Log (F(high) - F(low)) of the logistic distribution: F(high) (1 - F(low)) (1 - e^(low - high)), without loss."""
    sigmoid = torch.nn.functional.logsigmoid
    return sigmoid(high) + sigmoid(-low) + torch.log(-torch.expm1(low - high))


def _log_between_gaussian(low: Tensor, high: Tensor) -> Tensor:
    """Log (F(high) - F(low)) of the normal distribution, computed in the tail where both are small."""
    mirrored = low + high > 0
    low, high = torch.where(mirrored, -high, low), torch.where(mirrored, -low, high)
    upper, lower = torch.special.log_ndtr(high), torch.special.log_ndtr(low)
    return upper + torch.log(-torch.expm1((lower - upper).clamp(max=-_LEAST)))


_DISTRIBUTIONS = {
    "logistic": (torch.nn.functional.logsigmoid, _log_between_logistic),
    "gaussian": (torch.special.log_ndtr, _log_between_gaussian),
}
"""For each distribution: log F, and the logarithm of a difference of F."""
