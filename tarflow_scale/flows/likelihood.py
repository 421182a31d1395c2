"""Convert pixels to floats and back, and log densities to nats and bits/dim; the only code that adds noise to pixels.

A pixel of n-bit data has 2^n levels, stored in the n high bits of a uint8. On [-1, 1] a level's bin is 2 / 2^n wide.

* Uniform dequantization is x = 2 (level + u) / 2^n - 1 with u in [0, 1). The cost of a discrete image is its negative
  log probability. By Jensen's inequality the mean of -log p(x) over u, plus D (n - 1) ln 2, is an upper bound of this
  cost (Theis et al., arXiv 1511.01844). In bits per dimension:

      bits/dim = -log_prob / (D ln 2) + n - 1

  With K draws of u, the importance-weighted estimate -log mean_k p(x_k), plus the same constant, is a tighter bound,
  which converges to the cost itself as K grows (Burda et al., arXiv 1509.00519; the proposal is uniform on the bin and
  has density 1).

* Variational dequantization maps u to u' in the same bin by a second flow (`tarflow_scale.flows.dequantization`). The
  formulas above hold with log p(x') - log q(u' | levels) in place of log_prob; q is a density on a bin of width 1.

* Gaussian noise is x = 2 level / (2^n - 1) - 1 + std * e. TarFlow trains with it for sample quality (arXiv 2412.06329).
  The flow then gives the density of noisy data, and its bits/dim are not comparable.

Shapes: images (B, C, H, W) uint8; x (B, C, H, W) float on [-1, 1]; log_prob (B,) nats, summed over dimensions.
"""

import math
from collections.abc import Iterable
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from tarflow_scale.randomness import Purpose, generator
from tarflow_scale.records import PixelFormat

__all__ = [
    "add_noise",
    "bits_per_dim",
    "combine_draws",
    "dequantized",
    "nats_per_image",
    "quantize",
    "rounding_of",
    "to_levels",
]


def to_levels(images: UInt8[Tensor, "B C H W"], bit_depth: int) -> UInt8[Tensor, "B C H W"]:
    """Convert stored pixels to levels 0..2^bit_depth-1.

    Raises:
        ValueError: the bit depth is not in 1..8.
    """
    _check_depth(bit_depth)
    return images >> (8 - bit_depth)


def add_noise(
    images: UInt8[Tensor, "B C H W"], noise: Float[Tensor, "B C H W"], pixels: PixelFormat
) -> Float[Tensor, "B C H W"]:
    """Convert stored pixels to the floats that a flow is trained on.

    Args:
        images: stored pixels; they are not changed.
        noise: u in [0, 1) for uniform dequantization, a standard normal for Gaussian noise.
        pixels: bit depth of the pixels, and kind and size of the noise.
    """
    levels = to_levels(images, pixels.bit_depth).to(noise)
    num_levels = 2**pixels.bit_depth
    if pixels.noise == "uniform":
        return (levels + noise) * (2 / num_levels) - 1
    return levels * (2 / (num_levels - 1)) - 1 + pixels.noise_std * noise


def dequantized(
    images: UInt8[Tensor, "B C H W"], bit_depth: int, seed: int, samples: Iterable[int], draw: int = 0
) -> Float[Tensor, "B C H W"]:
    """Convert stored pixels to floats with uniform noise, which depends on (seed, sample, draw) alone.

    Args:
        images: stored pixels; they are not changed.
        bit_depth: number of high bits of a pixel that are data.
        seed: seed of the noise.
        samples: sample index of each image.
        draw: number of the draw, from 0.
    """
    noise = np.empty(images.shape, np.float32)
    for row, sample in zip(noise, samples, strict=True):
        row[...] = generator(Purpose.BITS_PER_DIM_NOISE, seed, sample, draw).random(row.shape, np.float32)
    return add_noise(images, torch.from_numpy(noise), PixelFormat(bit_depth=bit_depth, noise="uniform"))


def rounding_of(pixels: PixelFormat) -> Literal["floor", "nearest"]:
    """The rounding that inverts the training noise."""
    return "floor" if pixels.noise == "uniform" else "nearest"


def quantize(
    x: Float[Tensor, "B C H W"], bit_depth: int, rounding: Literal["floor", "nearest", "truncate"]
) -> UInt8[Tensor, "B C H W"]:
    """Convert floats, clipped to [-1, 1], to stored pixels; with the right rounding this inverts `add_noise`.

    ``floor`` takes the level of the bin that contains x. The other two choose among 2^n levels that are spaced evenly
    over [-1, 1]: ``nearest`` takes the nearest, and ``truncate`` the next lower one. ``truncate`` uses the same
    operations as the public evaluation code, so that rounding errors are equal too.
    """
    _check_depth(bit_depth)
    top = 2**bit_depth - 1
    x = x.float()
    match rounding:
        case "floor":
            levels = torch.floor((x + 1) * ((top + 1) / 2))
        case "nearest":
            levels = torch.round((x + 1) * (top / 2))
        case "truncate":
            levels = torch.floor(0.5 * (x.clamp(-1, 1) + 1) * top)
    return torch.round(levels.clamp(0, top) * (255 / top)).to(torch.uint8)


def nats_per_image(log_prob: Float[Tensor, " B"], num_dims: int, bit_depth: int) -> Float[Tensor, " B"]:
    """Negative log probability of each image in nats, from the log density of its dequantized values on [-1, 1]."""
    return -log_prob + num_dims * (bit_depth - 1) * math.log(2)


def bits_per_dim(log_prob: Float[Tensor, " B"], num_dims: int, bit_depth: int) -> Float[Tensor, " B"]:
    """Bits per dimension of uniformly dequantized ``bit_depth``-bit data, from the log density (nats) on [-1, 1]."""
    return nats_per_image(log_prob, num_dims, bit_depth) / (num_dims * math.log(2))


def combine_draws(log_probs: Float[Tensor, "K B"], estimate: Literal["mean", "importance"]) -> Float[Tensor, " B"]:
    """Combine the log densities of K dequantization draws of each image into one number per image.

    ``mean`` is the mean of the log densities; ``importance`` is the log of the mean density. For n-bit data, each of
    them minus D (n - 1) ln 2 is, on average over draws, a lower bound of the log probability of the discrete image;
    ``importance`` is at least as tight.

    Raises:
        ValueError: there are no draws, or the estimate is unknown.
    """
    if len(log_probs) == 0 or estimate not in ("mean", "importance"):
        raise ValueError(
            f"estimate must be mean or importance, with at least 1 draw (got {estimate!r} and {len(log_probs)} draws); "
            f"correct it"
        )
    if estimate == "mean":
        return log_probs.mean(dim=0)
    return torch.logsumexp(log_probs, dim=0) - math.log(len(log_probs))


def _check_depth(bit_depth: int) -> None:
    if not 1 <= bit_depth <= 8:
        raise ValueError(f"bit_depth must be 1 to 8 (got {bit_depth}); pixels are stored in 8 bits")
