"""Where an evaluation keeps what workers have done: features, moments and likelihoods of ranges of images.

A part is one ``.npz`` that is written whole or not at all, under a folder whose name is a digest of everything that
decides its content. So a worker may die, a part be made twice, or the whole job start again: what is there is right.
Parts of a set share a grid; whoever reads rows need not know it.
"""

import functools
import io
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tarflow_scale import storage
from tarflow_scale.errors import DataError

__all__ = ["Arrays", "FeatureSet", "Images", "Part", "packed", "parts_of", "read_arrays", "write_arrays"]

PART_IMAGES = 250
"""Images of a part: small enough to balance workers, large enough to hide the call."""
_MOST_PARTS = 64
"""Of moments, whose size does not depend on the number of images."""

Arrays = dict[str, NDArray[np.generic]]


@dataclass(frozen=True)
class Part:
    """What came of the images ``[start, stop)``."""

    folder: str
    start: int
    stop: int

    @property
    def name(self) -> str:
        """File name."""
        return f"{self.start:09d}-{self.stop:09d}.npz"

    @property
    def location(self) -> str:
        """Where it is."""
        return storage.join(self.folder, self.name)

    def write(self, arrays: Mapping[str, NDArray[np.generic]]) -> None:
        """Write at once."""
        write_arrays(self.location, arrays)

    def read(self, *names: str) -> Arrays:
        """Arrays by name, all if none is named; checked against the CRCs that they were written with.

        Raises:
            DataError: missing or damaged.
        """
        return read_arrays(self.location, *names)


def parts_of(folder: str, num: int, most: int | None = None) -> list[Part]:
    """The parts of ``num`` images, on the grid that all of this size share; at most ``most``."""
    size = PART_IMAGES if most is None else max(PART_IMAGES, -(-num // most))
    return [Part(folder, low, min(low + size, num)) for low in range(0, num, size)]


def packed(arrays: Mapping[str, NDArray[np.generic]]) -> bytes:
    """An ``.npz``; equal arrays give equal bytes."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # pyright: ignore[reportArgumentType]
    return buffer.getvalue()


def write_arrays(location: str, arrays: Mapping[str, NDArray[np.generic]]) -> None:
    """Write an ``.npz`` at once."""
    storage.write_bytes(location, packed(arrays))


def read_arrays(location: str, *names: str) -> Arrays:
    """Arrays of an ``.npz`` by name, all if none is named.

    Raises:
        DataError: missing or damaged.
    """
    if not storage.exists(location):
        raise DataError(f"{location} is gone, perhaps another evaluation tidied up; run the same command again")
    try:
        with np.load(io.BytesIO(storage.read_bytes(location)), allow_pickle=False) as found:
            return {name: found[name] for name in names or found.files}
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{location} is damaged ({error}); delete it, and run the same command again") from error


@functools.lru_cache(maxsize=8)
def _rows(location: str, layer: str) -> NDArray[np.float32]:
    """A layer of a part; few, because blocks of one part are asked for one after the other."""
    return read_arrays(location, layer)[layer].astype(np.float32, copy=False)


@dataclass(frozen=True)
class Images:
    """Which images, and how their values become levels.

    kind: ``sample`` for generated images of latents of ``seed``; ``reference`` for the reference data set, all of it
    in order where ``seed`` is None, else a random subset of ``num``.
    """

    kind: Literal["sample", "reference"]
    num: int
    seed: int | None
    bit_depth: int
    rounding: Literal["floor", "nearest", "truncate"]


@dataclass(frozen=True)
class FeatureSet:
    """Images seen by an extractor: what several protocols share.

    extractor_digest: see `tarflow_scale.metrics.features.weights_digest`. layers: of the extractor, ``pool`` and
    others. folder: where parts are. reduced: whether parts are moments of features rather than features.
    """

    images: Images
    extractor: str
    extractor_digest: str
    layers: tuple[str, ...]
    folder: str
    reduced: bool = False

    def parts(self) -> list[Part]:
        """All parts, in the order of images."""
        return parts_of(self.folder, self.images.num, _MOST_PARTS if self.reduced else None)

    def rows(self, layer: str, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Features ``(stop - start, D)`` of a layer; all where no range is given."""
        stop = self.images.num if stop is None else stop
        found = [
            _rows(part.location, layer)[max(start - part.start, 0) : stop - part.start]
            for part in self.parts()
            if part.start < stop and part.stop > start
        ]
        return np.concatenate(found)

    def hashes(self) -> Iterator[str]:
        """SHA-256 of the pixels of each reference image."""
        for part in self.parts():
            yield from (str(hash_) for hash_ in part.read("hashes")["hashes"])

    def beside(self, name: str) -> str:
        """Location of something else that is computed from the set."""
        return storage.join(self.folder, name)
