"""Improved precision and recall (arXiv 1904.06991): the share of one set inside balls around features of the other.

The radius of the ball of a feature is the distance to its k-th neighbour in the same set. Precision is the share of
generated images inside a ball of a reference image; recall is the share of reference images inside a ball of a
generated image. Distances are Euclidean, in float64. A task holds two blocks in memory.

The jackknife deletes blocks of generated images. For precision this removes queries. For recall it removes balls and
can enlarge the remaining balls, so the radii are also computed with each block left out.
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
    """Precision or recall of generated images, with its jackknife error."""
    balls, queries = (reference, samples) if kind == "precision" else (samples, reference)
    num_balls = len(blocks(balls.images.num))
    yield [_Radii(balls, neighbours, number) for number in range(num_balls)]
    counts = yield [
        _Inside(queries, balls, neighbours, number, deleted=kind == "recall")
        for number in range(len(blocks(queries.images.num)))
    ]
    inside = np.sum([count[0] for count in counts])
    num = queries.images.num
    if kind == "precision":
        sizes = [stop - start for start, stop in blocks(num)]
        without = [(inside - count[0]) / (num - size) for count, size in zip(counts, sizes, strict=True)]
    else:
        without = list(np.sum([count[1:] for count in counts], axis=0) / num)
    return Measured(float(inside / num), standard_error([float(share) for share in without]))


def _radii_location(balls: FeatureSet, neighbours: int, number: int) -> str:
    return balls.beside(f"radii-{balls.images.num}-{neighbours}-{number:02d}.npz")


@dataclass(frozen=True)
class _Radii:
    """A task that stores the ball radii of a block, computed with all features and with each block left out."""

    balls: FeatureSet
    neighbours: int
    number: int

    def run(self) -> None:
        location = _radii_location(self.balls, self.neighbours, self.number)
        if storage.exists(location):  # an earlier evaluation stored the radii of the reference
            return
        cut = blocks(self.balls.images.num)
        own = _rows(self.balls, cut[self.number])
        nearest: list[Tensor] = []
        for number, block in enumerate(cut):
            distances = torch.cdist(own, own if number == self.number else _rows(self.balls, block))
            if number == self.number:
                distances.fill_diagonal_(torch.inf)
            count = min(self.neighbours, distances.shape[1])
            smallest = distances.topk(count, dim=1, largest=False).values
            nearest.append(torch.nn.functional.pad(smallest, (0, self.neighbours - count), value=torch.inf))
        each = torch.stack(nearest)  # (blocks, rows, k)
        radii = [self._kth(each)]
        radii += [self._kth(torch.cat([each[:number], each[number + 1 :]])) for number in range(len(cut))]
        write_arrays(location, {"radii": torch.stack(radii).numpy()})

    def _kth(self, nearest: Tensor) -> Tensor:
        """The k-th smallest distance for each feature, given its k smallest distances in each block."""
        return nearest.permute(1, 0, 2).flatten(1).kthvalue(self.neighbours, dim=1).values


@dataclass(frozen=True)
class _Inside:
    """A task that counts the features of a block that lie inside at least one ball.

    If ``deleted``, it repeats the count with each block of balls left out.
    """

    queries: FeatureSet
    balls: FeatureSet
    neighbours: int
    number: int
    deleted: bool

    def run(self) -> list[int]:
        own = _rows(self.queries, blocks(self.queries.images.num)[self.number])
        cut = blocks(self.balls.images.num)
        inside = torch.zeros(1 + len(cut) if self.deleted else 1, len(own), dtype=torch.bool)
        for number, block in enumerate(cut):
            location = _radii_location(self.balls, self.neighbours, number)
            radii = torch.from_numpy(read_arrays(location)["radii"]).double()
            distances = torch.cdist(own, _rows(self.balls, block))
            in_block = (distances <= radii[0]).any(dim=1)
            inside[0] |= in_block
            for other in range(len(cut) if self.deleted else 0):
                if other == number:
                    continue
                grown = radii[1 + other] > radii[0]
                inside[1 + other] |= in_block | (distances[:, grown] <= radii[1 + other, grown]).any(dim=1)
        return inside.sum(dim=1).tolist()


def _rows(features: FeatureSet, block: tuple[int, int]) -> Tensor:
    return torch.from_numpy(features.rows("pool", *block)).double()
