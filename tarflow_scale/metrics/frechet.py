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

__all__ = ["Moments", "frechet_distance", "merge_all"]


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


def merge_all(parts: list[Moments]) -> Moments:
    """Merge any number of parts, pairwise, in the given order."""
    while len(parts) > 1:
        pairs = [parts[i : i + 2] for i in range(0, len(parts), 2)]
        parts = [pair[0].merge(pair[1]) if len(pair) == 2 else pair[0] for pair in pairs]
    return parts[0]


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared Fréchet distance by torch-fidelity's formula, in squared units of the features."""
    statistics = [{"mu": part.mean, "sigma": part.covariance} for part in (a, b)]
    return float(fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID])
