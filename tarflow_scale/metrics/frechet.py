"""Fréchet distance between Gaussians fitted to features, from moments that merge.

    d^2 = |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)      (Heusel et al., arXiv 1706.08500, equation 6)

Moments are (n, mean, M2) in float64, M2 = sum (x - mean)(x - mean)^T; parts are merged by Chan's pairwise rule in the
order of their images, so the result does not depend on who did what or when.
"""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

from tarflow_scale.metrics.jackknife import blocks, standard_error
from tarflow_scale.metrics.measure import Measure, Measured
from tarflow_scale.metrics.parts import Arrays, FeatureSet, read_arrays, write_arrays

__all__ = ["Moments", "frechet", "frechet_distance", "merged"]

_GROUPS = 10
"""Groups of index blocks whose moments are computed at once; their number bounds what the driver holds."""
_SIZES = (2, 4, 6, 8, 10)
"""Groups that the points of an extrapolation take together: disjoint sets of each size, as many as there are."""


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

    def without(self, other: "Moments") -> "Moments":
        """Moments of what is left of this set without a part of it; the inverse of `merge`."""
        num = self.num - other.num
        mean = self.mean + (self.mean - other.mean) * (other.num / num)
        delta = other.mean - mean
        m2 = self.m2 - other.m2 - np.outer(delta, delta) * (num * other.num / self.num)
        return Moments(num, mean, m2)

    @property
    def covariance(self) -> NDArray[np.float64]:
        """Unbiased covariance ``(D, D)``."""
        return self.m2 / (self.num - 1)

    def to_arrays(self, layer: str) -> Arrays:
        """For `tarflow_scale.metrics.parts`."""
        return {f"{layer}.num": np.array(self.num), f"{layer}.mean": self.mean, f"{layer}.m2": self.m2}

    @classmethod
    def stored(cls, location: str, layer: str) -> "Moments":
        """Inverse of `to_arrays`, from a file that may hold other arrays too.

        Raises:
            DataError: missing or damaged.
        """
        names = [f"{layer}.{part}" for part in ("num", "mean", "m2")]
        num, mean, m2 = read_arrays(location, *names).values()
        return cls(int(num), mean.astype(np.float64, copy=False), m2.astype(np.float64, copy=False))


def merged(parts: Iterable[Moments]) -> Moments:
    """Moments of all parts, merged in their order; one part is held at a time."""
    return functools.reduce(Moments.merge, parts)


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared Fréchet distance by torch-fidelity's formula, in squared units of the features."""
    statistics = [{"mu": part.mean, "sigma": part.covariance} for part in (a, b)]
    return float(fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID])


class _Distance:
    """The same distance to one reference, many times: tr (S1 S2)^(1/2) = tr (R S2 R)^(1/2) with R = S1^(1/2).

    R S2 R is symmetric, which is several times faster than the eigenvalues of a product; they agree to rounding.
    """

    def __init__(self, reference: Moments) -> None:
        self._mean = torch.from_numpy(reference.mean)
        covariance = torch.from_numpy(reference.covariance)
        values, vectors = torch.linalg.eigh(covariance)
        self._root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
        self._trace = covariance.trace()

    def to(self, moments: Moments) -> float:
        covariance = torch.from_numpy(moments.covariance)
        product = self._root @ covariance @ self._root
        cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
        shift = (torch.from_numpy(moments.mean) - self._mean).square().sum()
        return float(shift + self._trace + covariance.trace() - 2 * cross)


@functools.lru_cache(maxsize=2)
def _distance_to(location: str, layer: str) -> _Distance:
    """One reference a process; the files never change under their names."""
    return _Distance(Moments.stored(location, layer))


def frechet(samples: FeatureSet, layer: str, reference: str, infinity: bool) -> Measure:
    """Distance of generated images to a reference, plain or extrapolated, with its jackknife.

    Args:
        samples: features of generated images.
        layer: which of them.
        reference: location of the reference's moments.
        infinity: whether to extrapolate.
    """
    cut = blocks(samples.images.num)
    groups = [cut[i : i + -(-len(cut) // _GROUPS)] for i in range(0, len(cut), -(-len(cut) // _GROUPS))]
    found = yield [_GroupMoments(samples, layer, group[0][0], group[-1][1]) for group in groups]
    if infinity:
        return (yield from _extrapolated(samples, layer, reference, groups, found))
    total = merged(found)
    location = samples.beside(f"moments-{layer}-{samples.images.num}.npz")
    write_arrays(location, total.to_arrays(layer))
    without = yield [_WithoutBlocks(samples, layer, (location,), reference, tuple(group)) for group in groups]
    value = frechet_distance(total, Moments.stored(reference, layer))
    return Measured(value, standard_error([distance for several in without for distance in several]))


@dataclass(frozen=True)
class _GroupMoments:
    """Moments of the features of a range of images."""

    samples: FeatureSet
    layer: str
    start: int
    stop: int

    def run(self) -> Moments:
        return Moments.of(torch.from_numpy(self.samples.rows(self.layer, self.start, self.stop)))


@dataclass(frozen=True)
class _WithoutBlocks:
    """Distances of a set without each of some blocks of it (or with all, where there are none)."""

    samples: FeatureSet
    layer: str
    moments: tuple[str, ...]
    reference: str
    blocks: tuple[tuple[int, int], ...]

    def run(self) -> list[float]:
        distance = _distance_to(self.reference, self.layer)
        total = merged(Moments.stored(location, self.layer) for location in self.moments)
        if not self.blocks:
            return [distance.to(total)]
        parts = (torch.from_numpy(self.samples.rows(self.layer, *block)) for block in self.blocks)
        return [distance.to(total.without(Moments.of(part))) for part in parts]


def _extrapolated(
    samples: FeatureSet, layer: str, reference: str, groups: list[list[tuple[int, int]]], found: Sequence[Moments]
) -> Measure:
    """The distance at infinitely many images: the intercept of a line in 1 / n through disjoint subsets.

    The bias of the plain distance is a constant over n to first order (Chong and Forsyth, arXiv 1911.07023).
    """
    locations = [samples.beside(f"moments-{layer}-{samples.images.num}-group-{i}.npz") for i in range(len(groups))]
    for location, moments in zip(locations, found, strict=True):
        write_arrays(location, moments.to_arrays(layer))
    sets = [
        range(low, low + size)
        for size in _SIZES
        for low in range(0, len(groups) - size + 1, size)
    ]  # fmt: skip
    points = yield [_WithoutBlocks(samples, layer, tuple(locations[g] for g in one), reference, ()) for one in sets]
    pairs = [(i, g) for i, one in enumerate(sets) for g in one]
    without = yield [
        _WithoutBlocks(samples, layer, tuple(locations[g] for g in sets[i]), reference, tuple(groups[group]))
        for i, group in pairs
    ]
    sizes = [sum(stop - start for g in one for start, stop in groups[g]) for one in sets]
    distances = [distance for (distance,) in points]
    deleted: list[float] = []
    for group, several in enumerate(groups):
        for place, (start, stop) in enumerate(several):
            n, d = list(sizes), list(distances)
            for (i, g), result in zip(pairs, without, strict=True):
                if g == group:
                    n[i], d[i] = sizes[i] - (stop - start), result[place]
            deleted.append(_intercept(n, d))
    return Measured(_intercept(sizes, distances), standard_error(deleted))


def _intercept(sizes: Sequence[int], distances: Sequence[float]) -> float:
    """Of the least-squares line through ``(1 / n, distance)``."""
    return float(np.polynomial.polynomial.polyfit(1 / np.array(sizes), np.array(distances), 1)[0])
