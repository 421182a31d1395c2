"""Kernel distance (KID, arXiv 1801.01401): unbiased squared MMD with the kernel (x . y / D + 1)^3.

The value is the mean over the same random subsets as in torch-fidelity. It approximates the statistic over all images;
the stored error is the jackknife error of that statistic. The jackknife needs only the sum of the kernel over each pair
of blocks, so each sum is computed once.
"""

import functools
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch_fidelity.metric_kid import kernel_mmd

from tarflow_scale.metrics.jackknife import blocks, standard_error
from tarflow_scale.metrics.measure import Measure, Measured
from tarflow_scale.metrics.parts import FeatureSet

__all__ = ["kernel_distance"]

_TASKS = 10


def kernel_distance(
    samples: FeatureSet, reference: FeatureSet, num_subsets: int, subset_size: int, subset_seed: int
) -> Measure:
    """The mean kernel distance over subsets, with the jackknife error of the distance over all images."""
    cut = blocks(samples.images.num)
    step = -(-num_subsets // _TASKS)
    results = yield [
        *(
            _Subsets(samples, reference, subset_size, subset_seed, low, min(low + step, num_subsets))
            for low in range(0, num_subsets, step)
        ),
        *(_KernelSums(samples, reference, number) for number in range(len(cut))),
    ]
    subsets, sums = results[: -len(cut)], results[-len(cut) :]
    value = float(np.mean([distance for distances in subsets for distance in distances]))
    return Measured(value, standard_error(_without_each(cut, reference.images.num, sums)))


@functools.lru_cache(maxsize=2)
def _all_rows(features: FeatureSet) -> NDArray[np.float32]:
    return features.rows("pool")


@dataclass(frozen=True)
class _Subsets:
    """A task that computes the distances of the subsets ``[start, stop)``. It holds all features in memory in fp32."""

    samples: FeatureSet
    reference: FeatureSet
    size: int
    seed: int
    start: int
    stop: int

    def run(self) -> list[float]:
        rng = np.random.RandomState(self.seed)
        a, b = _all_rows(self.samples), _all_rows(self.reference)
        distances: list[float] = []
        for number in range(self.stop):
            chosen = [rng.choice(len(rows), self.size, replace=False) for rows in (a, b)]
            if number >= self.start:
                distances.append(float(kernel_mmd(a[chosen[0]], b[chosen[1]])))
        return distances


@dataclass(frozen=True)
class _KernelSums:
    """A task that sums the kernel over pairs of images; the first image of each pair is in block ``number``.

    It returns one sum per block, for this block and each later one, and the sum over pairs with a reference image.
    """

    samples: FeatureSet
    reference: FeatureSet
    number: int

    def run(self) -> tuple[list[float], float]:
        cut = blocks(self.samples.images.num)
        own = _wide(self.samples, cut[self.number])
        kernel = _kernel(own, own)
        inside = [float(kernel.sum() - kernel.diagonal().sum())]
        inside += [float(_kernel(own, _wide(self.samples, block)).sum()) for block in cut[self.number + 1 :]]
        across = sum(float(_kernel(own, _wide(self.reference, b)).sum()) for b in blocks(self.reference.images.num))
        return inside, across


def _wide(features: FeatureSet, block: tuple[int, int]) -> torch.Tensor:
    return torch.from_numpy(features.rows("pool", *block)).double()


def _kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


def _without_each(cut: list[tuple[int, int]], num_reference: int, sums: list[tuple[list[float], float]]) -> list[float]:
    """The statistic with each block left out. A constant is omitted: the term for pairs of reference images."""
    count = len(cut)
    inside = np.zeros((count, count))
    for number, (row, _) in enumerate(sums):
        inside[number, number:] = row
        inside[number:, number] = row
    across = np.array([total for _, total in sums])
    values: list[float] = []
    for number, (start, stop) in enumerate(cut):
        left = cut[-1][1] - (stop - start)
        kept = inside.sum() - 2 * inside[number].sum() + inside[number, number]
        rest = across.sum() - across[number]
        values.append(float(kept / (left * (left - 1)) - 2 * rest / (left * num_reference)))
    return values
