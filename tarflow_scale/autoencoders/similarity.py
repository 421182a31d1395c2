"""How similar a decoded image is to the original, for images on [-1, 1]."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

__all__ = ["SSIM_PIXELS", "psnr", "ssim"]

_LEAST_ERROR = 1e-10
"""Smallest mean squared error; it bounds the PSNR by 106 dB."""
SSIM_PIXELS = 11
"""Side of the window of the SSIM in pixels; images must not be smaller."""
_SSIM_DEVIATION = 1.5
_SSIM_CONSTANTS = (0.01 * 2) ** 2, (0.03 * 2) ** 2
"""The constants (K L)^2 of the SSIM, for values with a range of L = 2."""


def psnr(x: Float[Tensor, "B K H W"], decoded: Float[Tensor, "B K H W"]) -> Float[Tensor, " B"]:
    """Peak signal-to-noise ratio in dB, 10 log10(4 / mean squared error); decoded values are clipped to [-1, 1]."""
    error = (decoded.clamp(-1, 1) - x).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(4 / error.clamp(min=_LEAST_ERROR))


def ssim(x: Float[Tensor, "B K H W"], decoded: Float[Tensor, "B K H W"]) -> Float[Tensor, " B"]:
    """Structural similarity (Wang et al., IEEE Transactions on Image Processing 13, 2004), in float64.

    It is the mean over channels and over all places of a Gaussian window of 11 x 11 pixels, with a standard deviation
    of 1.5, that lie inside the image. Decoded values are clipped to [-1, 1].
    """
    a, b = x.double() + 1, decoded.double().clamp(-1, 1) + 1  # the formula is for values from 0 to L
    first, second = _SSIM_CONSTANTS
    mean_a, mean_b = _blurred(a), _blurred(b)
    variances = _blurred(a.square()) + _blurred(b.square()) - mean_a.square() - mean_b.square()
    covariance = _blurred(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + first) / (mean_a.square() + mean_b.square() + first)
    return (luminance * (2 * covariance + second) / (variances + second)).flatten(1).mean(dim=1)


def _blurred(x: Tensor) -> Tensor:
    """Averages over the windows inside an image, for each channel."""
    places = torch.arange(SSIM_PIXELS, dtype=x.dtype, device=x.device) - SSIM_PIXELS // 2
    line = torch.exp(-0.5 * (places / _SSIM_DEVIATION).square())
    window = torch.outer(line, line) / line.sum() ** 2
    return F.conv2d(x.flatten(0, 1)[:, None], window[None, None]).unflatten(0, x.shape[:2])[:, :, 0]
