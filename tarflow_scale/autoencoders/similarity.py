"""How similar a decoded image is to the original."""

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["psnr"]

_LEAST_ERROR = 1e-10
"""Smallest mean squared error; it bounds the PSNR by 106 dB."""


def psnr(x: Float[Tensor, "B K H W"], decoded: Float[Tensor, "B K H W"]) -> Float[Tensor, " B"]:
    """Peak signal-to-noise ratio in dB, 10 log10(4 / mean squared error), of images on [-1, 1].

    Decoded values are clipped to [-1, 1].
    """
    error = (decoded.clamp(-1, 1) - x).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(4 / error.clamp(min=_LEAST_ERROR))
