"""Picture of a flow in two dimensions: its density beside its samples."""

import functools

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw
from torch import Tensor

from tarflow_scale.density.conditional import marginal_log_prob
from tarflow_scale.flows import Flow
from tarflow_scale.flows.latents import latents
from tarflow_scale.shards.images import encode_png

__all__ = ["density_picture", "log_density"]

_SIDE, _GRID = 320, 160
"""Side length of a panel, in pixels and in grid points of the density."""
_MARGIN_LEFT, _MARGIN_BOTTOM, _GAP = 44, 26, 16
_SAMPLES = 2000
_MIDDLE = (0.5, 99.5)
"""A panel shows the range between these percentiles of the samples, plus a tenth of this range on each side."""
_AT_ONCE = 4096
_INK, _PAPER = (22, 60, 112), (255, 255, 255)


@torch.no_grad()
def density_picture(flow: Flow, seed: int = 0) -> bytes:
    """Draw a PNG of two panels with the same axes: the density, darker where it is higher, and samples.

    Shades follow the square root of the density, so that regions of low density are visible. For a flow with classes
    the density is the mean over classes.

    Args:
        flow: a flow on vectors of two numbers, in evaluation mode, unconditional or class-conditional.
        seed: seed of the samples.

    Raises:
        ValueError: the data of the flow are not vectors of two numbers, the flow is conditioned on numbers, or no
            sample is finite.
    """
    if flow.event_shape != (2,) or flow.num_conditions is not None:
        given = f" given {flow.num_conditions} numbers" if flow.num_conditions else ""
        raise ValueError(
            f"a density picture needs a flow of vectors of two numbers, unconditional or with classes "
            f"(got event shape {flow.event_shape}{given}); use another flow"
        )
    reference = next(flow.parameters())
    labels = torch.arange(_SAMPLES, device=reference.device) % flow.num_classes if flow.num_classes else None
    drawn = flow.inverse(latents(seed, range(_SAMPLES), 2).to(reference), labels).cpu().double().numpy()
    drawn = drawn[np.isfinite(drawn).all(axis=1)]
    if not len(drawn):
        raise ValueError("a density picture needs finite samples (got none); check the training of the flow")
    low, high = np.percentile(drawn, _MIDDLE, axis=0)
    room = 0.1 * np.maximum(high - low, 1e-6)
    low, high = low - room, high + room
    steps = (np.arange(_GRID) + 0.5) / _GRID
    first, second = low[0] + steps * (high[0] - low[0]), low[1] + steps[::-1] * (high[1] - low[1])
    points = np.stack(np.meshgrid(first, second), axis=-1).reshape(-1, 2)
    log_p = log_density(flow, torch.from_numpy(points).to(reference)).cpu().double().numpy().reshape(_GRID, _GRID)
    log_p = np.where(np.isfinite(log_p), log_p, -np.inf)
    shade = np.exp(0.5 * (log_p - log_p.max())) if np.isfinite(log_p.max()) else np.zeros_like(log_p)
    return _drawn(shade, drawn, low, high)


def log_density(flow: Flow, x: Float[Tensor, "B D"]) -> Float[Tensor, " B"]:
    """``log p(x)`` in nats, with all classes of the flow equally likely."""
    log_prob = flow.log_prob if flow.num_classes is None else functools.partial(marginal_log_prob, flow)
    return torch.cat([log_prob(part) for part in x.split(_AT_ONCE)])


def _drawn(
    shade: Float[np.ndarray, "G G"],
    samples: Float[np.ndarray, "N 2"],
    low: Float[np.ndarray, " 2"],
    high: Float[np.ndarray, " 2"],
) -> bytes:
    width, height = _MARGIN_LEFT + 2 * _SIDE + _GAP, _SIDE + _MARGIN_BOTTOM
    canvas = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(canvas)
    mixed = _mixed(shade)
    canvas.paste(Image.fromarray(mixed).resize((_SIDE, _SIDE), Image.Resampling.BILINEAR), (_MARGIN_LEFT, 0))
    right = _MARGIN_LEFT + _SIDE + _GAP
    places = (samples - low) / (high - low) * (_SIDE - 1)
    for x, y in places[((samples >= low) & (samples <= high)).all(axis=1)]:
        left, top = right + x, _SIDE - 1 - y
        draw.ellipse((left - 1, top - 1, left + 1, top + 1), fill=_INK)
    for left in (_MARGIN_LEFT, right):
        draw.rectangle((left, 0, left + _SIDE - 1, _SIDE - 1), outline=(128, 128, 128))
        draw.text((left, _SIDE + 6), f"{low[0]:.3g}", fill=_INK)
        draw.text((left + _SIDE, _SIDE + 6), f"{high[0]:.3g}", fill=_INK, anchor="ra")
    draw.text((_MARGIN_LEFT - 4, 2), f"{high[1]:.3g}", fill=_INK, anchor="ra")
    draw.text((_MARGIN_LEFT - 4, _SIDE - 12), f"{low[1]:.3g}", fill=_INK, anchor="ra")
    return encode_png(np.asarray(canvas).transpose(2, 0, 1))


def _mixed(shade: Float[np.ndarray, "G G"]) -> UInt8[np.ndarray, "G G 3"]:
    ink, paper = np.array(_INK, dtype=np.float64), np.array(_PAPER, dtype=np.float64)
    return np.round(paper + shade[..., None] * (ink - paper)).astype(np.uint8)
