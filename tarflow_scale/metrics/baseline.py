"""Baseline: a full-covariance Gaussian fitted to pixels, measured by the same protocols as a flow.

Pixels are measured in levels. Dequantization adds u in [0, 1) to each level, which increases the mean by 1/2 and the
variance by 1/12. Shapes: B images, D pixels.
"""

import math

import numpy as np
import torch
from torch import Tensor

from tarflow_scale.config.protocols import FrechetProtocol
from tarflow_scale.flows import standard_normal_log_prob
from tarflow_scale.metrics.frechet import Moments
from tarflow_scale.randomness import Purpose, generator

__all__ = ["MAX_DIMS", "PixelGaussian", "gaussian_for"]

MAX_DIMS = 4096
"""Largest number of dimensions for which a Gaussian baseline is computed."""


class PixelGaussian:
    """Gaussian with the mean and covariance of dequantized training pixels.

    Args:
        moments: moments of the pixel levels of the training images.
        bit_depth: bits per pixel; there are 2^bit_depth levels.
    """

    def __init__(self, moments: Moments, bit_depth: int) -> None:
        self._top = 2**bit_depth - 1
        self._mean = torch.from_numpy(moments.mean) + 0.5
        covariance = torch.from_numpy(moments.covariance) + torch.eye(len(moments.mean)) / 12
        self._factor = torch.linalg.cholesky(covariance)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density ``(B,)`` in nats of dequantized images ``(B, C, H, W)`` on [-1, 1]."""
        levels_per_unit = (self._top + 1) / 2
        levels = (x.double().flatten(1) + 1) * levels_per_unit
        whitened = torch.linalg.solve_triangular(self._factor, (levels - self._mean).T, upper=False)
        log_det = levels.shape[1] * math.log(levels_per_unit) - self._factor.diagonal().log().sum()
        return standard_normal_log_prob(whitened.T) + log_det

    def sample_levels(self, num: int, seed: int) -> Tensor:
        """Pixel levels of ``num`` samples, ``(num, D)`` float64, rounded down and clipped to the range of levels."""
        z = np.stack([generator(Purpose.BASELINE, seed, i).standard_normal(len(self._mean)) for i in range(num)])
        return (torch.from_numpy(z) @ self._factor.T + self._mean).floor().clamp(0, self._top)


def gaussian_for(protocol: FrechetProtocol, reference: Moments) -> PixelGaussian | None:
    """The Gaussian fitted to the reference images; None if the features are not pixels or have too many dimensions."""
    if protocol.extractor != "pixels" or len(reference.mean) > MAX_DIMS:
        return None
    return PixelGaussian(reference, protocol.bit_depth)
