"""Anomaly scores from likelihoods, and how well they tell two sets of images apart.

Every score is higher for what is more anomalous. With b the bits/dim of an image under the flow:

* ``likelihood``: b. A flow may find simple images that it never saw more likely than what it was trained on (Nalisnick
  et al., arXiv 1810.09136), so this score alone can be worse than chance.
* ``complexity``: b - c with c the bits/dim of the image in the best of several lossless codecs (Serra et al., arXiv
  1909.11480; their S, of which the bits of the whole image are a multiple).
* ``typicality``: |b - h| with h the mean of b over held-out normal images (Nalisnick et al., arXiv 1906.02994, for one
  image at a time).
* ``likelihood_ratio``: b - b' with b' the bits/dim under a background model (Ren et al., arXiv 1906.02845).

Shapes: B images, C channels, H W pixels.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from PIL import Image, features

__all__ = [
    "SCORES",
    "Separation",
    "codecs",
    "compressed_bits_per_dim",
    "scores_of",
    "separate",
    "threshold",
]

SCORES = {
    "likelihood": "bits/dim; may be lower for simple images that were never seen than for normal ones",
    "complexity": "bits/dim less those of the best lossless codec",
    "typicality": "distance of bits/dim from their mean over held-out normal images",
    "likelihood_ratio": "bits/dim less those of the background model",
}
"""What each score is, in words."""

_FOUND_SHARE = 0.95
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Separation:
    """How well a score tells anomalies (positives) from normal images.

    auroc: probability that an anomaly scores higher than a normal image. aupr: average precision.
    false_positive_rate_95: share of normal images that are flagged where 95 % of anomalies are.
    """

    auroc: float
    aupr: float
    false_positive_rate_95: float


def scores_of(
    bits: NDArray[np.float64],
    compressed: NDArray[np.float64],
    typical_bits: float,
    background: NDArray[np.float64] | None,
) -> dict[str, NDArray[np.float64]]:
    """All scores ``(B,)`` of images, the likelihood ratio where there is a background model.

    Args:
        bits: bits/dim under the flow.
        compressed: see `compressed_bits_per_dim`.
        typical_bits: mean bits/dim of held-out normal images.
        background: bits/dim under the background model.
    """
    found: dict[str, NDArray[np.float64]] = {
        "likelihood": bits,
        "complexity": bits - compressed,
        "typicality": np.abs(bits - typical_bits),
    }
    return found if background is None else found | {"likelihood_ratio": bits - background}


def threshold(normal: NDArray[np.float64], false_alarm_rate: float) -> float:
    """The lowest of these scores that at most this share of them exceeds."""
    allowed = int(false_alarm_rate * len(normal) + _ROUNDING)
    return float(np.sort(normal)[len(normal) - 1 - allowed])


def separate(normal: NDArray[np.float64], anomalous: NDArray[np.float64]) -> Separation:
    """Compare scores of normal images with those of anomalies."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    truth = np.concatenate([np.zeros(len(normal)), np.ones(len(anomalous))])
    both = np.concatenate([normal, anomalous])
    least = np.sort(anomalous)[int((1 - _FOUND_SHARE) * len(anomalous) + _ROUNDING)]
    return Separation(
        auroc=float(roc_auc_score(truth, both)),
        aupr=float(average_precision_score(truth, both)),
        false_positive_rate_95=float((normal >= least).mean()),
    )


def compressed_bits_per_dim(levels: UInt8[np.ndarray, "B C H W"]) -> Float[np.ndarray, " B"]:
    """Bits/dim of each image in the lossless codec that packs it best, headers included.

    Args:
        levels: levels of pixels, 0 to 2^n - 1, with 1 or 3 channels.
    """
    dims = levels[0].size
    available = codecs()
    return np.array([8 * min(len(encode(_picture(one))) for encode in available.values()) / dims for one in levels])


def codecs() -> dict[str, Callable[[Image.Image], bytes]]:
    """The lossless codecs that this Pillow has, by name."""
    found = {"png": lambda image: _saved(image, format="PNG", optimize=True)}
    if features.check("webp"):
        found["webp"] = lambda image: _saved(image, format="WEBP", lossless=True, quality=100, method=4)
    if features.check("jpg_2000"):
        found["jpeg2000"] = lambda image: _saved(image, format="JPEG2000", irreversible=False)
    return found


def _saved(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **options)  # pyright: ignore[reportArgumentType]
    return buffer.getvalue()


def _picture(levels: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(levels[0] if levels.shape[0] == 1 else np.ascontiguousarray(levels.transpose(1, 2, 0)))
