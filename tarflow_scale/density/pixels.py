"""Likelihood of images in memory under a flow: their bits/dim, and the contribution of every pixel.

These functions give the same numbers for an array as the verbs ``evaluate`` and ``score`` give for a data set. Image i
of the array, counted from 0, gets the same noise as sample i of a data set.

Shapes: B images, C channels, H W pixels.
"""

from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from tarflow_scale.flows import Flow
from tarflow_scale.flows.conditions import GivenCondition
from tarflow_scale.flows.inputs import check_draws, check_shape
from tarflow_scale.flows.likelihood import bits_per_dim, combine_draws, dequantized

__all__ = ["image_bits_per_dim", "image_nats", "image_tensor"]


def image_tensor(flow: Flow, images: UInt8[np.ndarray, "B C H W"], seed: int = 0, draw: int = 0) -> Tensor:
    """Convert stored pixels to dequantized floats ``(B, C, H, W)`` on [-1, 1].

    Args:
        flow: a flow of images; its pixel format gives the bit depth of the data.
        images: stored pixels, 0 to 255.
        seed: seed of the noise.
        draw: index of the noise draw, from 0.

    Raises:
        ValueError: the flow was trained on images with Gaussian noise or on vectors, or the images are not uint8 or do
            not fit it.
    """
    if flow.pixels is None or flow.pixels.noise != "uniform":
        form = "an unknown format" if flow.pixels is None else f"{flow.pixels.noise} noise"
        form = form if flow.latents is None else "latents"
        raise ValueError(f"bits/dim need a flow of uniformly dequantized images (got {form}); load another model")
    kind = getattr(images, "dtype", type(images).__name__)
    if kind != np.uint8:
        raise ValueError(f"stored pixels must be a NumPy array of uint8, 0 to 255 (got {kind}); convert them")
    check_draws(draw, seed=seed)
    stored = torch.from_numpy(np.ascontiguousarray(images))
    check_shape(stored, flow.event_shape, of_array=True)
    x = dequantized(stored, flow.pixels.bit_depth, seed, range(len(images)), draw)
    return x.to(next(flow.parameters()))


@torch.no_grad()
def image_bits_per_dim(
    flow: Flow,
    images: UInt8[np.ndarray, "B C H W"],
    y: GivenCondition = None,
    num_draws: int = 1,
    seed: int = 0,
    estimate: Literal["mean", "importance"] = "mean",
) -> Float[np.ndarray, " B"]:
    """An upper bound on the bits/dim of each discrete image; see `tarflow_scale.flows.likelihood`.

    Args:
        flow: a flow of images.
        images: stored pixels, 0 to 255.
        y: as in `Flow.log_prob`.
        num_draws: number of noise draws for each image.
        seed: seed of the noise.
        estimate: how draws are combined; see `combine_draws`.

    Raises:
        ValueError: see `image_tensor`; or the labels do not fit the flow.
    """
    draws = [flow.log_prob_of_images(image_tensor(flow, images, seed, k), y).double() for k in _draws(num_draws)]
    assert flow.pixels is not None
    return bits_per_dim(combine_draws(torch.stack(draws), estimate), flow.num_dims, flow.pixels.bit_depth).cpu().numpy()


@torch.no_grad()
def image_nats(
    flow: Flow, images: UInt8[np.ndarray, "B C H W"], y: GivenCondition = None, num_draws: int = 1, seed: int = 0
) -> Float[np.ndarray, "B C H W"]:
    """Contribution of each value to the nats of its image, averaged over noise draws; see `Flow.nats_of_values`.

    Raises:
        ValueError: see `image_bits_per_dim` and `Flow.nats_of_values`.
    """
    draws = [flow.nats_of_values(image_tensor(flow, images, seed, k), y, dequantize=True) for k in _draws(num_draws)]
    return torch.stack(draws).mean(dim=0).cpu().numpy()


def _draws(num: int) -> range:
    if num < 1:
        raise ValueError(f"num_draws must be at least 1 (got {num}); correct it")
    return range(num)
