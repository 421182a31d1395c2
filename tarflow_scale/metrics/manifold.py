"""Improved precision and recall (arXiv 1904.06991): the share of a set inside balls around the other's features.

Precision asks of each generated image whether it lies within some reference image's ball, which reaches to that
image's k-th neighbour; recall asks the reverse. Distances are Euclidean, in float64; every task holds two blocks.

For the jackknife of precision a deleted block of samples takes its questions away. For that of recall it takes its
balls away, and the balls of others grow: radii are kept without each block, and questions asked of all of them.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tarflow_scale import storage
from tarflow_scale.metrics.jackknife import blocks, standard_error
from tarflow_scale.metrics.measure import Measure, Measured
from tarflow_scale.metrics.parts import FeatureSet, read_arrays, write_arrays

__all__ = ["manifold_share"]


def manifold_share(
    kind: Literal["precision", "recall"], samples: FeatureSet, reference: FeatureSet, neighbours: int
) -> Measure:
    """Precision or recall, and its jackknife over samples."""
    balls, asking = (reference, samples) if kind == "precision" else (samples, reference)
    num_balls = len(blocks(balls.images.num))
    yield [_Radii(balls, neighbours, number) for number in range(num_balls)]
    counts = yield [
        _Inside(asking, balls, neighbours, number, deleted=kind == "recall")
        for number in range(len(blocks(asking.images.num)))
    ]
    inside = np.sum([count[0] for count in counts])
    num = asking.images.num
    if kind == "precision":
        sizes = [stop - start for start, stop in blocks(num)]
        without = [(inside - count[0]) / (num - size) for count, size in zip(counts, sizes, strict=True)]
    else:
        without = list(np.sum([count[1:] for count in counts], axis=0) / num)
    return Measured(float(inside / num), standard_error([float(one) for one in without]))


def _radii_location(balls: FeatureSet, neighbours: int, number: int) -> str:
    return balls.beside(f"radii-{balls.images.num}-{neighbours}-{number:02d}.npz")


@dataclass(frozen=True)
class _Radii:
    """Radii of the balls of a block, stored: among all features, and among all but those of each block."""

    balls: FeatureSet
    neighbours: int
    number: int

    def run(self) -> None:
        location = _radii_location(self.balls, self.neighbours, self.number)
        if storage.exists(location):  # of a reference, from an earlier evaluation
            return
        cut = blocks(self.balls.images.num)
        own = _rows(self.balls, cut[self.number])
        nearest: list[Tensor] = []
        for number, block in enumerate(cut):
            distances = torch.cdist(own, own if number == self.number else _rows(self.balls, block))
            if number == self.number:
                distances.fill_diagonal_(torch.inf)
            few = min(self.neighbours, distances.shape[1])
            found = distances.topk(few, dim=1, largest=False).values
            nearest.append(torch.nn.functional.pad(found, (0, self.neighbours - few), value=torch.inf))
        each = torch.stack(nearest)  # (blocks, rows, k)
        radii = [self._kth(each)]
        radii += [self._kth(torch.cat([each[:number], each[number + 1 :]])) for number in range(len(cut))]
        write_arrays(location, {"radii": torch.stack(radii).numpy()})

    def _kth(self, nearest: Tensor) -> Tensor:
        """The k-th smallest of each row over blocks."""
        return nearest.permute(1, 0, 2).flatten(1).kthvalue(self.neighbours, dim=1).values


@dataclass(frozen=True)
class _Inside:
    """How many of a block lie inside some ball; and with ``deleted``, how many would without each block of balls."""

    asking: FeatureSet
    balls: FeatureSet
    neighbours: int
    number: int
    deleted: bool

    def run(self) -> list[int]:
        own = _rows(self.asking, blocks(self.asking.images.num)[self.number])
        cut = blocks(self.balls.images.num)
        inside = torch.zeros(1 + len(cut) if self.deleted else 1, len(own), dtype=torch.bool)
        for number, block in enumerate(cut):
            location = _radii_location(self.balls, self.neighbours, number)
            radii = torch.from_numpy(read_arrays(location)["radii"]).double()
            distances = torch.cdist(own, _rows(self.balls, block))
            found = (distances <= radii[0]).any(dim=1)
            inside[0] |= found
            for other in range(len(cut) if self.deleted else 0):
                if other == number:
                    continue
                grown = radii[1 + other] > radii[0]
                inside[1 + other] |= found | (distances[:, grown] <= radii[1 + other, grown]).any(dim=1)
        return inside.sum(dim=1).tolist()


def _rows(features: FeatureSet, block: tuple[int, int]) -> Tensor:
    return torch.from_numpy(features.rows("pool", *block)).double()
