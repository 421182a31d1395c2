"""Checks of the arguments that users pass to a flow; each mistake is reported in one line.

Images on another scale cause no error by themselves: the density of pixels on [0, 1] looks plausible but is wrong. So
each call checks the values, with one transfer from the device. Code under a compiler, a tracer or torch.func cannot
read values and skips these checks.
"""

import math
import operator
import warnings
from numbers import Real
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tarflow_scale.flows.conditions import hides_values
from tarflow_scale.records import PixelFormat

__all__ = ["check_draws", "check_shape", "check_stored", "check_values"]

_FAR = 4.0
"""Images on [-1, 1], with or without noise, and samples of a trained model have almost no values beyond +-4."""
_MOST_FAR_SHARE = 0.01
_OUTSIDE, _MOST_OUTSIDE_SHARE = 1.5, 0.05
"""Images that were standardised to mean 0 and deviation 1 have a tenth of their values beyond +-1.5."""
_DARKEST, _SMALLEST_RANGE = 0.1, 0.5
"""The smallest value of a batch on [0, 1] is near 0 and its range is large. A batch on [-1, 1] is seldom like that."""
_ADVICE = "use x / 127.5 - 1 for 8-bit pixels x, or tarflow_scale.density.image_tensor, which also adds the noise"


def check_shape(x: object, event_shape: tuple[int, ...], of_array: bool = False) -> None:
    """Raise ValueError unless ``x`` is a tensor with a batch of events of this shape; values are not read.

    Args:
        x: the batch.
        event_shape: shape of the events of the flow.
        of_array: whether the user passed a NumPy array, so that the message suggests code for arrays.
    """
    shape = tuple(_checked_tensor(x, event_shape).shape)
    if shape[1:] == event_shape:
        return
    cure = "pass data of this shape"
    if _channels_last(shape, event_shape):
        cure = f"put the channels first with x.{'transpose' if of_array else 'permute'}(0, 3, 1, 2)"
    elif shape == event_shape:
        cure = "pass a single sample as x[None]"
    raise ValueError(
        f"{_noun(event_shape)} must have shape (batch, {', '.join(map(str, event_shape))}) (got {shape}); {cure}"
    )


def check_values(
    x: object, event_shape: tuple[int, ...], like: Tensor, pixels: PixelFormat | None, logit_alpha: float | None
) -> None:
    """Check the type and the values of a batch.

    A batch that seems to be on [0, 1], or standardised, causes a warning instead of an error, because bright images on
    [-1, 1] and samples of an untrained model look the same.

    Args:
        x: the batch ``(B, *event)``.
        event_shape: shape of the events of the flow.
        like: one of the weights of the flow.
        pixels: pixel format of the training images; None if unknown.
        logit_alpha: parameter of `to_logits`, which is defined only slightly beyond [-1, 1]; None if it is not used.

    Raises:
        ValueError: ``x`` is not a tensor of floats in the precision and on the device of ``like``, or its values cannot
            be images on [-1, 1].
    """
    x, noun = _checked_tensor(x, event_shape), _noun(event_shape)
    is_image = pixels is not None and pixels.noise != "none"
    if not x.is_floating_point():
        if len(event_shape) == 3:
            raise ValueError(_stored_refused(x, x.dtype, event_shape))
        raise ValueError(f"{noun} must be floats (got {x.dtype}); use x.float()")
    check_shape(x, event_shape)
    if x.device != like.device:
        cure = f"use x.to({str(like.device)!r})"
        raise ValueError(f"{noun} must be on the device of the flow's weights, {like.device} (got {x.device}); {cure}")
    if x.dtype != like.dtype and not torch.is_autocast_enabled(x.device.type):
        cure = f"use x.to({like.dtype})"
        raise ValueError(f"{noun} must have the precision of the flow's weights, {like.dtype} (got {x.dtype}); {cure}")
    if hides_values() or x.is_meta or x.numel() == 0:
        return
    values = x.detach()
    size = values.abs()
    shares = ((size > limit).double().mean() for limit in (_FAR, _OUTSIDE))
    statistics = [(~torch.isfinite(values)).sum(), values.amin(), values.amax(), *shares]
    bad, low, high, far, outside = torch.stack([value.double() for value in statistics]).tolist()  # one wait
    if bad:
        raise ValueError(f"{noun} must be finite (got {bad:.0f} values that are not); check how they were made")
    if logit_alpha is not None and max(-low, high) >= 1 / (1 - 2 * logit_alpha):
        raise ValueError(
            f"{noun} of a flow with model.logit_alpha={logit_alpha:g} must lie inside +-{1 / (1 - 2 * logit_alpha):.6g}"
            f", where its density is not 0 (got {low:g} to {high:g}); {_ADVICE}"
        )
    if is_image and far > _MOST_FAR_SHARE:
        raise ValueError(f"{noun} must be on [-1, 1] (got {low:g} to {high:g}); {_ADVICE}")
    if is_image and 0 <= low < _DARKEST and high <= 1 and high - low > _SMALLEST_RANGE:
        _warn(f"these images seem to be on [0, 1] (got {low:g} to {high:g})", "if they are, use 2 * x - 1")
    if is_image and outside > _MOST_OUTSIDE_SHARE:
        finding = f"{outside:.0%} of the values of these images are beyond +-{_OUTSIDE:g} (got {low:g} to {high:g})"
        _warn(finding, "if the images were standardised, reverse the standardisation")


def check_draws(
    num: object, temperature: object = 1.0, batch_size: object = None, seed: object = None, generator: object = None
) -> None:
    """Raise ValueError for invalid arguments of sampling. Temperature 0 is valid: all latents are then 0."""
    if not _is_whole(num, 0):
        raise ValueError(f"the number of samples must be an integer >= 0 (got {num!r}); correct it")
    if not (isinstance(temperature, Real | Tensor) and 0 <= float(temperature) < math.inf):
        raise ValueError(f"temperature must be a finite number >= 0 (got {temperature!r}); use 1 to sample the model")
    if batch_size is not None and not _is_whole(batch_size, 1):
        raise ValueError(
            f"batch_size must be an integer >= 1, or None (got {batch_size!r}); None decodes all samples together"
        )
    if seed is not None and not _is_whole(seed, 0, 2**64):
        raise ValueError(f"seed must be an integer in 0..2^64-1 (got {seed!r}); choose another")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(f"generator must be a torch.Generator (got {generator!r}); pass a number as seed")


def check_stored(x: object, event_shape: tuple[int, ...]) -> None:
    """Raise ValueError unless ``x`` can be converted to stored pixels."""
    check_shape(x, event_shape)
    x = _checked_tensor(x, event_shape)
    if not x.is_floating_point():
        raise ValueError(
            f"images to convert to pixels must be floats on [-1, 1] (got {x.dtype}); pass samples of the flow"
        )
    if not bool(torch.isfinite(x).all()):
        raise ValueError("images to convert to pixels must be finite (got values that are not finite); check the model")


def _is_whole(value: object, low: int, beyond: float | int = math.inf) -> bool:
    try:
        return not isinstance(value, bool) and low <= operator.index(value) < beyond  # pyright: ignore
    except TypeError:
        return False


def _checked_tensor(x: object, event_shape: tuple[int, ...]) -> Tensor:
    if isinstance(x, np.ndarray):
        if len(event_shape) == 3 and x.dtype.kind in "iu":
            raise ValueError(_stored_refused(x, x.dtype, event_shape))
        first = "x.transpose(0, 3, 1, 2)" if _channels_last(x.shape, event_shape) else "x"
        raise ValueError(
            f"{_noun(event_shape)} must be a tensor (got a NumPy array of {x.dtype}); "
            f"use torch.as_tensor({first}, dtype=torch.float32)"
        )
    if not isinstance(x, Tensor):
        kind = f"{type(x).__module__}.{type(x).__name__}"
        raise ValueError(
            f"{_noun(event_shape)} must be a tensor (got {kind}); convert an array with torch.as_tensor(x)"
        )
    return x


def _channels_last(shape: tuple[int, ...], event_shape: tuple[int, ...]) -> bool:
    return len(event_shape) == 3 and shape[1:] == (*event_shape[1:], event_shape[0]) != event_shape


def _stored_refused(x: Tensor | NDArray[Any], kind: object, event_shape: tuple[int, ...]) -> str:
    """The error message for integer images, which are stored pixels. Users can run the suggested code as it is."""
    is_tensor, channels_last = isinstance(x, Tensor), _channels_last(tuple(x.shape), event_shape)
    images = "x" + f".{'permute' if is_tensor else 'transpose'}(0, 3, 1, 2)" * channels_last
    images += ".cpu().numpy()" * is_tensor
    images += "" if "uint8" in str(kind) else ".astype('uint8')"
    return (
        f"images must be floats on [-1, 1] (got {kind}); for pixels from 0 to 255, use "
        f"tarflow_scale.density.image_bits_per_dim(flow, {images}) to get bits/dim, or image_tensor to get floats"
    )


def _warn(finding: str, cure: str) -> None:
    warnings.warn(f"{finding}, but this flow expects [-1, 1]; {cure}", stacklevel=6)  # the line that called log_prob


def _noun(event_shape: tuple[int, ...]) -> str:
    return "images" if len(event_shape) == 3 else "vectors"
