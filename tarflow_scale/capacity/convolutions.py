"""Operations and activations of a convolutional autoencoder in a training step, from its configuration.

On a level of width W with P pixels and R residual blocks, the encoder and the decoder each take

    2 P 9 (2 R W^2) + 2 P 9 W W'

operations. The second term is the convolution between this level and the next, which has width W'; the encoder computes
it on the P / 4 pixels of the next level. The first and the last convolution are added. Autograd saves 6 R W numbers per
pixel inside the blocks, the input of the convolution between levels, and 3 W before the last convolution.
"""

import math
from collections.abc import Iterator
from itertools import pairwise

from tarflow_scale.config.autoencoder import ConvolutionalConfig

__all__ = ["autoencoder_activations", "autoencoder_flops"]

_IMAGES_IN_LOSS = 12
"""Tensors of the size of an image that the likelihood saves."""


def _levels(config: ConvolutionalConfig, shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Width and number of pixels of each level."""
    for level, width in enumerate(config.widths):
        yield width, math.prod(shape[1:]) >> (2 * level)


def autoencoder_flops(config: ConvolutionalConfig, shape: tuple[int, ...]) -> float:
    """Operations to encode and decode one image ``(K, H, W)``."""
    levels = list(_levels(config, shape))
    (first, pixels), (last, places) = levels[0], levels[-1]
    moments = config.latent_channels * (2 if config.posterior == "learned" else 1)
    products = pixels * 2 * shape[0] * first + places * last * (moments + config.latent_channels)
    products += sum(4 * config.blocks * width**2 * own for width, own in levels)
    products += sum(wide * narrow * (own + fewer) for (narrow, own), (wide, fewer) in pairwise(levels))
    return 18.0 * products


def autoencoder_activations(config: ConvolutionalConfig, shape: tuple[int, ...]) -> tuple[float, float]:
    """Numbers per image that the networks save for the backward pass, and those of the loss."""
    levels = list(_levels(config, shape))
    (first, pixels), (last, places) = levels[0], levels[-1]
    saved = 12.0 * config.blocks * sum(width * own for width, own in levels) + 3 * (last * places + first * pixels)
    saved += sum(own * (narrow + wide) for (narrow, own), (wide, _) in pairwise(levels))
    return saved, float(_IMAGES_IN_LOSS * math.prod(shape))
