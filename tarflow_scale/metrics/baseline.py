"""A full-covariance Gaussian fitted to pixels: the model that any flow must beat, by the same protocols.

Units are levels: a dequantised pixel is level + u with u in [0, 1), so its mean is larger by 1/2 and its variance by
1/12 than the level's. Shapes: B images, D pixels.
"""

import math

import numpy as np
import torch
from torch import Tensor

from tarflow_scale.config import FrechetProtocol
from tarflow_scale.metrics.frechet import Moments
from tarflow_scale.randomness import Purpose, generator

__all__ = ["PixelGaussian", "gaussian_for"]

_MAX_DIMS = 4096
"""Above this many pixels a full covariance is not a sensible baseline."""


class PixelGaussian:
    """Gaussian with the mean and covariance of dequantised training pixels.

    Args:
        moments: of the levels of the training images.
        bit_depth: n.
    """

    def __init__(self, moments: Moments, bit_depth: int) -> None:
        self._top = 2**bit_depth - 1
        self._mean = torch.from_numpy(moments.mean) + 0.5
        covariance = torch.from_numpy(moments.covariance) + torch.eye(len(moments.mean)) / 12
        self._factor = torch.linalg.cholesky(covariance)

    def bits_per_dim(self, pixels: Tensor) -> Tensor:
        """Bits per dimension ``(B,)`` of dequantised pixels ``(B, D)`` in levels."""
        num_dims = pixels.shape[1]
        whitened = torch.linalg.solve_triangular(self._factor, (pixels.double() - self._mean).T, upper=False)
        log_det = self._factor.diagonal().log().sum()
        nats = 0.5 * whitened.square().sum(dim=0) + log_det + 0.5 * num_dims * math.log(2 * math.pi)
        return nats / (num_dims * math.log(2))

    def sample_levels(self, num: int, seed: int) -> Tensor:
        """``(num, D)`` float64 samples, floored to bins and clipped to levels."""
        z = np.stack([generator(Purpose.BASELINE, seed, i).standard_normal(len(self._mean)) for i in range(num)])
        return (torch.from_numpy(z) @ self._factor.T + self._mean).floor().clamp(0, self._top)


def gaussian_for(protocol: FrechetProtocol, reference: Moments) -> PixelGaussian | None:
    """The Gaussian of a reference measured in pixels; None for other features, or too many pixels."""
    if protocol.extractor != "pixels" or len(reference.mean) > _MAX_DIMS:
        return None
    return PixelGaussian(reference, protocol.bit_depth)
