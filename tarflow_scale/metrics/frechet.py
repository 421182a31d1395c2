"""Fréchet distance between Gaussians fitted to features, computed from mergeable moments.

    d^2 = |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)      (Heusel et al., arXiv 1706.08500, equation 6)

Moments are (n, mean, M2) in float64, M2 = sum (x - mean)(x - mean)^T; parts are merged by Chan's pairwise rule in the
order of their images, so the result does not depend on the workers.
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
"""Number of groups of jackknife blocks. The driver holds the moments of all groups, so this bounds its memory."""
_SIZES = (2, 4, 6, 8, 10)
"""Sizes of the image subsets for the extrapolation, counted in groups; subsets of equal size are disjoint."""


@dataclass(frozen=True)
class Moments:
    """Count, mean ``(D,)`` and sum of centred outer products ``m2 (D, D)`` of features."""

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
        """Moments of this set after its subset ``other`` is removed; the inverse of `merge`."""
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
        """Arrays to store with `tarflow_scale.metrics.parts`."""
        return {f"{layer}.num": np.array(self.num), f"{layer}.mean": self.mean, f"{layer}.m2": self.m2}

    @classmethod
    def stored(cls, location: str, layer: str) -> "Moments":
        """Read moments that were stored with `to_arrays`, from a file that may hold other arrays too.

        Raises:
            DataError: the file is missing or damaged.
        """
        names = [f"{layer}.{part}" for part in ("num", "mean", "m2")]
        num, mean, m2 = read_arrays(location, *names).values()
        return cls(int(num), mean.astype(np.float64, copy=False), m2.astype(np.float64, copy=False))


def merged(parts: Iterable[Moments]) -> Moments:
    """Merge the moments of all parts in order. To save memory, pass an iterator that loads one part at a time."""
    return functools.reduce(Moments.merge, parts)


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared Fréchet distance by torch-fidelity's formula, in squared units of the features."""
    statistics = [{"mu": part.mean, "sigma": part.covariance} for part in (a, b)]
    return float(fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID])


class _Distance:
    """Computes Fréchet distances to one reference.

    It uses tr (S1 S2)^(1/2) = tr (R S2 R)^(1/2), where R = S1^(1/2) is computed only once. R S2 R is symmetric, so its
    eigenvalues are much faster to compute than the eigenvalues of S1 S2. Both traces are equal up to rounding.
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
    """The `_Distance` to a stored reference. It is cached in each process, because the file never changes."""
    return _Distance(Moments.stored(location, layer))


def frechet(samples: FeatureSet, layer: str, reference: str, infinity: bool) -> Measure:
    """Squared Fréchet distance of generated images to a reference, with its jackknife error.

    Args:
        samples: features of generated images.
        layer: layer of the features.
        reference: path or URL of the moments of the reference.
        infinity: whether to extrapolate to infinitely many images.
    """
    cut = blocks(samples.images.num)
    groups = [cut[i : i + -(-len(cut) // _GROUPS)] for i in range(0, len(cut), -(-len(cut) // _GROUPS))]
    moments = yield [_GroupMoments(samples, layer, group[0][0], group[-1][1]) for group in groups]
    if infinity:
        return (yield from _extrapolated(samples, layer, reference, groups, moments))
    total = merged(moments)
    location = samples.beside(f"moments-{layer}-{samples.images.num}.npz")
    write_arrays(location, total.to_arrays(layer))
    without = yield [_WithoutBlocks(samples, layer, (location,), reference, tuple(group)) for group in groups]
    value = frechet_distance(total, Moments.stored(reference, layer))
    return Measured(value, standard_error([distance for distances in without for distance in distances]))


@dataclass(frozen=True)
class _GroupMoments:
    """A task that computes the moments of features for the images ``[start, stop)``."""

    samples: FeatureSet
    layer: str
    start: int
    stop: int

    def run(self) -> Moments:
        return Moments.of(torch.from_numpy(self.samples.rows(self.layer, self.start, self.stop)))


@dataclass(frozen=True)
class _WithoutBlocks:
    """A task that computes, for each of ``blocks``, the distance without this block.

    If ``blocks`` is empty, it computes the distance of the whole set.
    """

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
    samples: FeatureSet, layer: str, reference: str, groups: list[list[tuple[int, int]]], moments: Sequence[Moments]
) -> Measure:
    """Distance for infinitely many images: intercept of a line in 1 / n, fitted to distances of subsets of n images.

    To first order, the bias of the plain distance is proportional to 1 / n (Chong and Forsyth, arXiv 1911.07023).
    """
    locations = [samples.beside(f"moments-{layer}-{samples.images.num}-group-{i}.npz") for i in range(len(groups))]
    for location, part in zip(locations, moments, strict=True):
        write_arrays(location, part.to_arrays(layer))
    sets = [range(low, low + size) for size in _SIZES for low in range(0, len(groups) - size + 1, size)]
    points = yield [
        _WithoutBlocks(samples, layer, tuple(locations[g] for g in chosen), reference, ()) for chosen in sets
    ]
    pairs = [(i, g) for i, chosen in enumerate(sets) for g in chosen]
    without = yield [
        _WithoutBlocks(samples, layer, tuple(locations[g] for g in sets[i]), reference, tuple(groups[group]))
        for i, group in pairs
    ]
    sizes = [sum(stop - start for g in part for start, stop in groups[g]) for part in sets]
    distances = [distance for (distance,) in points]
    deleted: list[float] = []
    for group, group_blocks in enumerate(groups):
        for place, (start, stop) in enumerate(group_blocks):
            n, d = list(sizes), list(distances)
            for (i, g), result in zip(pairs, without, strict=True):
                if g == group:
                    n[i], d[i] = sizes[i] - (stop - start), result[place]
            deleted.append(_intercept(n, d))
    return Measured(_intercept(sizes, distances), standard_error(deleted))


def _intercept(sizes: Sequence[int], distances: Sequence[float]) -> float:
    """Intercept of the least-squares line through ``(1 / n, distance)``."""
    return float(np.polynomial.polynomial.polyfit(1 / np.array(sizes), np.array(distances), 1)[0])
