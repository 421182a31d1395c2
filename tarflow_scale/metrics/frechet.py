"""Fréchet distance between Gaussians fitted to features, from moments that merge.

    d^2 = |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)      (Heusel et al., arXiv 1706.08500, equation 6)

Moments are (n, mean, M2) in float64, M2 = sum (x - mean)(x - mean)^T; parts are merged by Chan's pairwise rule, so
the result does not depend on how images were divided among workers, to rounding.
"""

import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

__all__ = ["Moments", "OrderedMerge", "frechet_distance"]


@dataclass(frozen=True)
class Moments:
    """Count, mean ``(D,)`` and centred second moment ``(D, D)`` of features."""

    num: int
    mean: NDArray[np.float64]
    m2: NDArray[np.float64]

    @classmethod
    def of(cls, features: Tensor) -> "Moments":
        """Moments of features ``(B, D)``."""
        x = features.double().numpy()
        mean = x.mean(axis=0)
        centred = x - mean
        return cls(len(x), mean, centred.T @ centred)

    def merge(self, other: "Moments") -> "Moments":
        """Moments of both sets together (Chan, Golub and LeVeque, 1979)."""
        num = self.num + other.num
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.num / num)
        m2 = self.m2 + other.m2 + np.outer(delta, delta) * (self.num * other.num / num)
        return Moments(num, mean, m2)

    @property
    def covariance(self) -> NDArray[np.float64]:
        """Unbiased covariance ``(D, D)``."""
        return self.m2 / (self.num - 1)

    def to_bytes(self) -> bytes:
        """As ``.npz``."""
        buffer = io.BytesIO()
        np.savez(buffer, num=np.array(self.num), mean=self.mean, m2=self.m2)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> "Moments":
        """Inverse of `to_bytes`."""
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return cls(int(arrays["num"]), arrays["mean"], arrays["m2"])


class OrderedMerge:
    """Merges parts in the order of their images, whatever the order in which they come.

    Only parts that came early are kept, so the memory does not grow with their number.
    """

    def __init__(self) -> None:
        self._early: dict[int, tuple[int, Moments]] = {}
        self._merged: Moments | None = None
        self._next = 0

    def add(self, start: int, stop: int, part: Moments) -> None:
        """Add the moments of images ``[start, stop)``."""
        self._early[start] = (stop, part)
        while self._next in self._early:
            self._next, following = self._early.pop(self._next)
            self._merged = following if self._merged is None else self._merged.merge(following)

    def result(self) -> Moments:
        """Moments of all images.

        Raises:
            ValueError: when a part is missing.
        """
        if self._merged is None or self._early:
            raise ValueError(f"a part is missing from image {self._next} on; add all parts first")
        return self._merged


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared Fréchet distance by torch-fidelity's formula, in squared units of the features."""
    statistics = [{"mu": part.mean, "sigma": part.covariance} for part in (a, b)]
    return float(fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID])
