"""Parts: the files in which ``evaluate`` and ``score`` store the results of workers for ranges of images.

A part is one ``.npz`` that is written completely or not at all, in a folder whose name is a digest of everything that
determines its content. A part that exists is correct, even if a worker died, two workers wrote the same part, or the
whole job started again. All sets of the same size are divided into the same ranges.
"""

import functools
import io
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from tarflow_scale import storage
from tarflow_scale.errors import DataError

__all__ = ["Arrays", "FeatureSet", "Images", "Part", "PartUnit", "packed", "parts_of", "read_arrays", "write_arrays"]

PART_IMAGES = 250
"""Number of images per part: small enough to balance workers, large enough to hide the cost of a call."""
_MOST_PARTS = 64
"""Maximum number of parts of a set that stores moments, which take the same space for any number of images."""

Arrays = dict[str, NDArray[np.generic]]


@dataclass(frozen=True)
class Part:
    """The results for the images ``[start, stop)``."""

    folder: str
    start: int
    stop: int

    @property
    def name(self) -> str:
        """Name of the file."""
        return f"{self.start:09d}-{self.stop:09d}.npz"

    @property
    def location(self) -> str:
        """Path or URL of the file."""
        return storage.join(self.folder, self.name)

    def write(self, arrays: Mapping[str, NDArray[np.generic]]) -> None:
        """Write the file, completely or not at all."""
        write_arrays(self.location, arrays)

    def read(self, *names: str) -> Arrays:
        """Read arrays of the file; see `read_arrays`."""
        return read_arrays(self.location, *names)


@dataclass(frozen=True)
class PartUnit:
    """A unit of work whose result is a part."""

    part: Part

    @property
    def num_images(self) -> int:
        """Number of images of the part."""
        return self.part.stop - self.part.start

    @classmethod
    def missing(cls, units: Sequence[Self]) -> list[Self]:
        """The units for which no part exists yet; each folder is listed only once."""
        existing = {folder: set(storage.list_names(folder)) for folder in {unit.part.folder for unit in units}}
        return [unit for unit in units if unit.part.name not in existing[unit.part.folder]]


def parts_of(folder: str, num: int, most: int | None = None) -> list[Part]:
    """Divide ``num`` images into parts of 250 images, or of more images if there would be more than ``most`` parts."""
    size = PART_IMAGES if most is None else max(PART_IMAGES, -(-num // most))
    return [Part(folder, low, min(low + size, num)) for low in range(0, num, size)]


def packed(arrays: Mapping[str, NDArray[np.generic]]) -> bytes:
    """Pack arrays into the bytes of an ``.npz`` file; equal arrays give equal bytes."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # pyright: ignore[reportArgumentType]
    return buffer.getvalue()


def write_arrays(location: str, arrays: Mapping[str, NDArray[np.generic]]) -> None:
    """Write an ``.npz``, completely or not at all."""
    storage.write_bytes(location, packed(arrays))


def read_arrays(location: str, *names: str) -> Arrays:
    """Read the named arrays of an ``.npz``, or all arrays if no name is given; numpy checks their CRCs.

    Raises:
        DataError: the file is missing or damaged.
    """
    if not storage.exists(location):
        raise DataError(
            f"{location} does not exist (another evaluation may have removed it); run the same command again"
        )
    try:
        with np.load(io.BytesIO(storage.read_bytes(location)), allow_pickle=False) as archive:
            return {name: archive[name] for name in names or archive.files}
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{location} is damaged ({error}); delete it, and run the same command again") from error


@functools.lru_cache(maxsize=8)
def _rows(location: str, layer: str) -> NDArray[np.float32]:
    """Features of a layer in a part. A small cache is enough, because callers read a part block by block."""
    return read_arrays(location, layer)[layer].astype(np.float32, copy=False)


@dataclass(frozen=True)
class Images:
    """The images that an extractor reads, and the settings that convert their values to pixel levels.

    kind: ``sample`` for images generated from latents of ``seed``; ``reconstruction`` for images of the split that an
    autoencoder decodes; ``reference`` for images of the reference data set:
    all of them in order if ``seed`` is None, otherwise a random subset of ``num`` images.
    """

    kind: Literal["sample", "reconstruction", "reference"]
    num: int
    seed: int | None
    bit_depth: int
    rounding: Literal["floor", "nearest", "truncate"]


@dataclass(frozen=True)
class FeatureSet:
    """Features that one extractor computes from some images; several protocols may share them.

    extractor_digest: see `tarflow_scale.metrics.features.weights_digest`. layers: layers of the extractor, such as
    ``pool``. folder: folder of the parts. reduced: whether parts hold moments of features instead of features.
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
        """Features ``(stop - start, D)`` of a layer for the images ``[start, stop)``; by default, for all images."""
        stop = self.images.num if stop is None else stop
        blocks = [
            _rows(part.location, layer)[max(start - part.start, 0) : stop - part.start]
            for part in self.parts()
            if part.start < stop and part.stop > start
        ]
        return np.concatenate(blocks)

    def hashes(self) -> Iterator[str]:
        """SHA-256 of the pixels of each reference image."""
        for part in self.parts():
            yield from map(str, part.read("hashes")["hashes"])

    def beside(self, name: str) -> str:
        """Location of a file in the folder of the parts, for a result that is computed from these features."""
        return storage.join(self.folder, name)
