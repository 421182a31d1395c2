"""Pictures of the pixels that contribute most to the nats of an image."""

import numpy as np
from jaxtyping import Float, UInt8

__all__ = ["overlaid"]

_LOW, _HIGH = 5.0, 99.5
"""Percentiles of the nats of all pixels at which red is weakest and strongest."""
_MOST_RED = 0.75


def overlaid(images: UInt8[np.ndarray, "B C H W"], nats: Float[np.ndarray, "B C H W"]) -> UInt8[np.ndarray, "B 3 H W"]:
    """Draw images in grey, and redder where the sum of nats over channels is higher. All images share one color scale.

    Args:
        images: stored pixels, with 1 or 3 channels.
        nats: see `tarflow_scale.flows.Flow.nats_of_values`.
    """
    pixel_nats = nats.sum(axis=1)
    low, high = np.percentile(pixel_nats, [_LOW, _HIGH])
    red = _MOST_RED * np.clip((pixel_nats - low) / max(high - low, 1e-9), 0, 1)
    grey = images.astype(np.float64).mean(axis=1)
    mixed = np.stack([(1 - red) * grey + red * 255, (1 - red) * grey, (1 - red) * grey], axis=1)
    return np.round(mixed).astype(np.uint8)
