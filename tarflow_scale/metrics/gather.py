"""What an evaluation is cut into, and how its parts come together again.

Units are ranges of images; results carry moments, bits/dim and hashes, never images. Whatever the order in which
they come back, they are put together in the order of their images, so the numbers do not depend on the workers.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tarflow_scale.metrics.frechet import Moments, OrderedMerge
from tarflow_scale.metrics.report import images_digest

__all__ = ["Results", "Unit", "UnitKind", "UnitResult"]

UnitKind = Literal["score", "sample", "reference", "real"]


@dataclass(frozen=True)
class Unit:
    """A range of images of one protocol.

    ``score``: log-likelihood of test images. ``sample``: moments of generated images. ``reference``: moments of
    reference images. ``real``: moments of a fixed random subset of them.
    """

    kind: UnitKind
    protocol: str
    start: int
    stop: int


@dataclass(frozen=True)
class UnitResult:
    """bits: bits/dim of each image. moments: of features. hashes: sha256 of each image's pixels."""

    bits: NDArray[np.float64] | None = None
    moments: Moments | None = None
    hashes: tuple[str, ...] = ()


class Results:
    """What came back: moments merged as they come, the rest by the place of its images."""

    def __init__(self) -> None:
        self._merges: dict[tuple[UnitKind, str], OrderedMerge] = {}
        self._rest: dict[tuple[UnitKind, str], dict[int, UnitResult]] = {}

    def add(self, unit: Unit, result: UnitResult) -> None:
        """Add what a unit gave."""
        key = (unit.kind, unit.protocol)
        if result.moments is not None:
            self._merges.setdefault(key, OrderedMerge()).add(unit.start, unit.stop, result.moments)
        self._rest.setdefault(key, {})[unit.start] = replace(result, moments=None)

    def moments(self, kind: UnitKind, path: str) -> Moments:
        """Merged moments of all images of a kind, by a protocol file."""
        return self._merges[kind, path].result()

    def parts(self, kind: UnitKind, path: str) -> list[UnitResult]:
        """Results without moments, in the order of their images."""
        return [result for _, result in sorted(self._rest[kind, path].items())]

    def images_digest(self, kind: UnitKind, path: str) -> str:
        """Digest of the images of a kind."""
        return images_digest(hash_ for part in self.parts(kind, path) for hash_ in part.hashes)
