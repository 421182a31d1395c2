"""Inception score (arXiv 1606.03498): exp of the mean KL divergence between p(class | image) and the mean p(class).

Let p be the class probabilities of an image and q their mean over a split of the images. The mean divergence is
mean(sum p log p) - sum q log q, so it can be computed from sums over blocks of images. The score is the mean over
splits. The order of images and the splits are the same as in torch-fidelity.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from tarflow_scale.metrics.jackknife import blocks, standard_error
from tarflow_scale.metrics.measure import Measure, Measured
from tarflow_scale.metrics.parts import FeatureSet

__all__ = ["inception_score"]

_LAYER = "logits_unbiased"


def inception_score(samples: FeatureSet, num_splits: int, shuffle_seed: int) -> Measure:
    """The mean score over splits, with its jackknife error."""
    cut = blocks(samples.images.num)
    sums = yield [_Sums(samples, num_splits, shuffle_seed, start, stop) for start, stop in cut]
    total = np.sum(sums, axis=0)
    return Measured(_score(total), standard_error([_score(total - part) for part in sums]))


def _score(sums: NDArray[np.float64]) -> float:
    """Mean score over splits, from sums ``(splits, 2 + classes)``: number of images, sum of p log p, sum of p."""
    filled = sums[sums[:, 0] > 0]
    q = filled[:, 2:] / filled[:, :1]
    divergence = filled[:, 1] / filled[:, 0] - (q * np.log(np.maximum(q, np.finfo(np.float64).tiny))).sum(axis=1)
    return float(np.exp(divergence).mean())


@dataclass(frozen=True)
class _Sums:
    """A task that computes the sums for `_score`, over the images ``[start, stop)``, separately for each split."""

    samples: FeatureSet
    num_splits: int
    seed: int
    start: int
    stop: int

    def run(self) -> NDArray[np.float64]:
        logits = torch.from_numpy(self.samples.rows(_LAYER, self.start, self.stop)).double()
        p, log_p = logits.softmax(dim=1), logits.log_softmax(dim=1)
        each = torch.cat([torch.ones(len(p), 1), (p * log_p).sum(dim=1, keepdim=True), p], dim=1)
        splits = torch.from_numpy(_splits(self.samples.images.num, self.num_splits, self.seed)[self.start : self.stop])
        sums = torch.zeros(self.num_splits, each.shape[1], dtype=torch.float64)
        return sums.index_add_(0, splits, each).numpy()


def _splits(num: int, num_splits: int, seed: int) -> NDArray[np.int64]:
    """Index of the split to which each image belongs, ``(num,)``."""
    order = np.random.RandomState(seed).permutation(num)
    splits = np.empty(num, dtype=np.int64)
    for split in range(num_splits):
        splits[order[split * num // num_splits : (split + 1) * num // num_splits]] = split
    return splits
