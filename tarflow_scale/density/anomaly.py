"""Anomaly scores from likelihoods, and how well they separate two sets of images.

Every score is higher for more anomalous images. With b the bits/dim of an image under the flow:

* ``likelihood``: b. A flow may assign a higher likelihood to simple images of another kind than to its training images
  (Nalisnick et al., arXiv 1810.09136), so this score alone can be worse than chance.
* ``complexity``: b - c with c the bits/dim of the image in the best of several lossless codecs (Serra et al., arXiv
  1909.11480; their S, divided by the number of dimensions).
* ``typicality``: |b - h| with h the mean of b over held-out normal images (Nalisnick et al., arXiv 1906.02994, for
  single images).
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
    "likelihood": "bits/dim; simple images of another kind may have lower values than normal images",
    "complexity": "bits/dim minus the bits/dim of the best lossless codec",
    "typicality": "distance of bits/dim from the mean bits/dim of held-out normal images",
    "likelihood_ratio": "bits/dim minus the bits/dim of the background model",
}
"""Description of each score."""

_DETECTED_SHARE = 0.95
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Separation:
    """How well a score separates anomalies (positives) from normal images.

    auroc: probability that an anomaly scores higher than a normal image. aupr: average precision.
    false_positive_rate_95: share of normal images that are flagged when 95 % of the anomalies are flagged.
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
    """Compute every score ``(B,)`` of B images; the likelihood ratio is included only with a background model.

    Args:
        bits: bits/dim under the flow.
        compressed: bits/dim in the best lossless codec; see `compressed_bits_per_dim`.
        typical_bits: mean bits/dim of held-out normal images.
        background: bits/dim under the background model, or None.
    """
    scores: dict[str, NDArray[np.float64]] = {
        "likelihood": bits,
        "complexity": bits - compressed,
        "typicality": np.abs(bits - typical_bits),
    }
    return scores if background is None else scores | {"likelihood_ratio": bits - background}


def threshold(normal: NDArray[np.float64], false_alarm_rate: float) -> float:
    """The lowest ``normal`` score such that at most a fraction ``false_alarm_rate`` of these scores is higher."""
    allowed = int(false_alarm_rate * len(normal) + _ROUNDING)
    return float(np.sort(normal)[len(normal) - 1 - allowed])


def separate(normal: NDArray[np.float64], anomalous: NDArray[np.float64]) -> Separation:
    """Measure how well a score separates normal images from anomalies."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    truth = np.concatenate([np.zeros(len(normal)), np.ones(len(anomalous))])
    both = np.concatenate([normal, anomalous])
    least = np.sort(anomalous)[int((1 - _DETECTED_SHARE) * len(anomalous) + _ROUNDING)]
    return Separation(
        auroc=float(roc_auc_score(truth, both)),
        aupr=float(average_precision_score(truth, both)),
        false_positive_rate_95=float((normal >= least).mean()),
    )


def compressed_bits_per_dim(levels: UInt8[np.ndarray, "B C H W"]) -> Float[np.ndarray, " B"]:
    """Bits/dim of each image in the lossless codec that compresses it best, including file headers.

    Args:
        levels: images with 1 or 3 channels, as pixel levels 0 to 2^n - 1.
    """
    dims = levels[0].size
    encoders = codecs().values()
    return np.array([8 * min(len(encode(_picture(image))) for encode in encoders) / dims for image in levels])


def codecs() -> dict[str, Callable[[Image.Image], bytes]]:
    """Encoders of the lossless codecs that the installed Pillow supports, keyed by name."""
    encoders = {"png": lambda image: _saved(image, format="PNG", optimize=True)}
    if features.check("webp"):
        encoders["webp"] = lambda image: _saved(image, format="WEBP", lossless=True, quality=100, method=4)
    if features.check("jpg_2000"):
        encoders["jpeg2000"] = lambda image: _saved(image, format="JPEG2000", irreversible=False)
    return encoders


def _saved(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **options)  # pyright: ignore[reportArgumentType]
    return buffer.getvalue()


def _picture(levels: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(levels[0] if levels.shape[0] == 1 else np.ascontiguousarray(levels.transpose(1, 2, 0)))
