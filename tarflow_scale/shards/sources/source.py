"""What every source of images offers, and the rules that turn encoded images of any size into images of one shape."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tarflow_scale.errors import DataError
from tarflow_scale.records import VectorFacts
from tarflow_scale.shards.images import Reading, decode_image, image_size, reads_alike, reduce_depth, resize_center_crop

__all__ = [
    "BadImage",
    "EncodedSource",
    "ImageSource",
    "ReducedSource",
    "Shaping",
]

_LOOKED_AT = 64
"""Images that are looked at before packing, to see whether they are grey."""


class BadImage(DataError):
    """One image of a source cannot be used; the others may be fine."""


class ImageSource(ABC):
    """Labelled images by number.

    A source knows its size, classes and format before it reads an image, and reads any one image by number, so that
    packing can be planned, split and ordered first. It can be pickled, so that worker processes can read from it.

    Args:
        name: name of the data set.
        description: where the images came from, for the manifest.
        class_names: names of the classes, in the order of their labels; empty without labels.
        bit_depth: high bits of a uint8 pixel that are data.
        labels: label of every image, ``(n,)`` int64; zeros without labels.
        digest: of what the source holds, so that a changed source is another data set; what is not read before
            packing, like the files of a folder, counts by name and size.
        official: ``(n,)`` int8, the split of every image as an index of `splits.PACKED`, where the source itself is
            divided; None where it is not.
        version: changes also when a file is written again with the same size, so that a packing that was killed does
            not go on with other images; the digest if that says as much.
    """

    ignored: Mapping[str, int] = MappingProxyType({})
    """Other files of the source by their kind, which are not read."""
    lines: Sequence[str] = ()
    """How splits and classes were found, what is left out, and warnings: a line each, for the plan."""

    def __init__(
        self,
        name: str,
        description: str,
        class_names: tuple[str, ...],
        bit_depth: int,
        labels: NDArray[np.int64],
        digest: str,
        official: NDArray[np.int8] | None = None,
        version: str = "",
    ) -> None:
        self.name = name
        self.description = description
        self.class_names = class_names
        self.bit_depth = bit_depth
        self.labels = labels
        self.digest = digest
        self.official = official
        self.version = version or digest
        self._check_labels()

    vectors: VectorFacts | None = None
    """Of a source of vectors, whose ``image`` gives their bytes; see `tarflow_scale.shards.vectors`."""
    reading: Reading | None = None
    """Of a source of image files: how they become pixels."""
    is_remote = False
    """Whether every image is read from a store, so that reading some at once pays."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of the images."""
        channels, height, width = self.image(0).shape
        return channels, height, width

    @abstractmethod
    def image(self, number: int) -> NDArray[np.uint8]:
        """Image ``number`` as ``(C, H, W)`` uint8.

        Raises:
            BadImage: it cannot be used.
        """

    def origin(self, number: int) -> str:
        """What image ``number`` was called at its source."""
        return f"{self.name}/{number}"

    def reads_alike(self, number: int) -> bool:
        """Whether image ``number`` has the same pixels with its `Reading` as without one."""
        return True

    def _check_labels(self) -> None:
        if not len(self.labels):
            raise DataError(f"no images in {self.name} ({self.description}); check source.path")
        highest = int(self.labels.max())
        if int(self.labels.min()) < 0 or (self.class_names and highest >= len(self.class_names)):
            wrong = int(self.labels.min()) if int(self.labels.min()) < 0 else highest
            raise DataError(
                f"labels of {self.name} must lie in 0..{len(self.class_names) - 1}, the classes that it names "
                f"(got {wrong}); correct its class map"
            )


@dataclass
class Shaping:
    """How an image file of any size becomes an image of the data set's shape.

    Args:
        size_pixels: side of the square result; None takes the size of the first image.
        resize: ``refuse`` images of another size, or ``center_crop``: short side to the size, then the centre.
        resample: filter of the resizing.
        skip_bad: images that cannot be used are left out, so that the first one may be one of them.
        reading: what orientation tags and transparency mean.
        shape: of all images, once `settle` knows it.
    """

    size_pixels: int | None
    resize: Literal["refuse", "center_crop"]
    resample: Literal["lanczos", "box", "bicubic"]
    skip_bad: bool
    reading: Reading
    shape: tuple[int, int, int] | None = None

    @property
    def words(self) -> str:
        """For the plan and the manifest."""
        turned = "turned upright" if self.reading.orientation == "apply" else "orientation tags ignored"
        over = "refused" if self.reading.transparency == "refuse" else f"over {self.reading.transparency}"
        size = "in their size"
        if self.resize == "center_crop":
            size = f"short side to {self.size_pixels} pixels ({self.resample}), then centre crop"
        return f"{turned}, transparency {over}, {size}"

    def settle(self, first: NDArray[np.uint8], origin: str, channels: int) -> None:
        """Let the first usable image decide the size that is left open; ``channels`` is 3 if any image has colours."""
        _, height, width = first.shape
        size = self.size_pixels or height
        if self.resize == "refuse" and (height, width) != (size, size):
            raise BadImage(
                f"images must be squares of one size (got {height}x{width} for {origin}, not {size}x{size}); "
                f"set source.resize=center_crop and source.size_pixels"
            )
        self.shape = (channels, size, size)

    def apply(self, image: NDArray[np.uint8], origin: str) -> NDArray[np.uint8]:
        """The image in the shape of the data set.

        Raises:
            BadImage: it has other channels, or another size where sizes may not change.
        """
        assert self.shape is not None
        if self.resize == "center_crop":
            try:
                image = resize_center_crop(image, self.shape[1], self.resample)
            except DataError as error:
                raise BadImage(f"{origin}: {error}") from error
        if image.shape[0] == 1 and self.shape[0] == 3:
            image = image.repeat(3, axis=0)
        if image.shape[0] != self.shape[0]:
            raise BadImage(f"images must be all grey or all coloured (got {origin} among grey ones); convert them")
        if image.shape != self.shape:
            raise BadImage(
                f"all images must have one shape (got {image.shape} for {origin}, not {self.shape}); "
                f"set source.resize=center_crop and source.size_pixels"
            )
        return image


class EncodedSource(ImageSource):
    """Images that lie somewhere as files of a format that `decode_image` reads.

    Args:
        shaping: what is done to sizes.
        others: as `ImageSource`; the description is completed with the shaping.
    """

    def __init__(
        self,
        shaping: Shaping,
        name: str,
        description: str,
        class_names: tuple[str, ...],
        labels: NDArray[np.int64],
        digest: str,
        official: NDArray[np.int8] | None = None,
        version: str = "",
    ) -> None:
        super().__init__(name, f"{description}, {shaping.words}", class_names, 8, labels, digest, official, version)
        self._shaping = shaping
        self.reading = shaping.reading
        self._settle()

    @abstractmethod
    def encoded(self, number: int) -> bytes:
        """The bytes of image ``number``."""

    def place(self, number: int) -> str:
        """Where image ``number`` lies, in full, for errors."""
        return self.origin(number)

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of the images."""
        assert self._shaping.shape is not None
        return self._shaping.shape

    def image(self, number: int) -> NDArray[np.uint8]:
        """Image ``number``, in the one shape of the data set."""
        return self._shaping.apply(self._decoded(number), self.place(number))

    def reads_alike(self, number: int) -> bool:
        """See `tarflow_scale.shards.images.reads_alike`."""
        return reads_alike(self.encoded(number), self.place(number), self._shaping.reading)

    def _settle(self) -> None:
        """Look at images that lie spread over the source: are there colours, and how large is the first usable one."""
        channels, first_fault = 1, None
        usable: list[int] = []
        for number in np.unique(np.linspace(0, len(self) - 1, min(_LOOKED_AT, len(self))).astype(int)).tolist():
            try:
                channels = max(channels, image_size(self.encoded(number), self.place(number), self.reading)[0])
                usable.append(number)
            except DataError as error:
                first_fault = first_fault or error
        if first_fault is not None and not self._shaping.skip_bad:
            raise BadImage(str(first_fault)) from first_fault
        for number in usable:
            try:
                return self._shaping.settle(self._decoded(number), self.place(number), channels)
            except BadImage as error:
                if not self._shaping.skip_bad:
                    raise
                first_fault = first_fault or error
        assert first_fault is not None
        raise BadImage(f"none of the {_LOOKED_AT} images that were looked at is usable, for one: {first_fault}")

    def _decoded(self, number: int) -> NDArray[np.uint8]:
        try:
            return decode_image(self.encoded(number), self.place(number), reading=self.reading)
        except DataError as error:
            raise BadImage(str(error)) from error


class ReducedSource(ImageSource):
    """Another source with fewer bits a pixel, as Glow is trained at high resolution (arXiv 1807.03039, section 6).

    Args:
        source: the source.
        bit_depth: high bits that are kept.

    Raises:
        DataError: the source has fewer.
    """

    def __init__(self, source: ImageSource, bit_depth: int) -> None:
        if bit_depth > source.bit_depth:
            raise DataError(
                f"source.bit_depth must not exceed the source's (got {bit_depth} for {source.bit_depth}-bit "
                f"{source.name}); lower it or leave it out"
            )
        super().__init__(
            name=source.name,
            description=f"{source.description}; {bit_depth} of {source.bit_depth} bits kept",
            class_names=source.class_names,
            bit_depth=bit_depth,
            labels=source.labels,
            digest=source.digest,
            official=source.official,
            version=source.version,
        )
        self._source = source
        self.is_remote = source.is_remote
        self.ignored = source.ignored
        self.lines = source.lines
        self.reading = source.reading

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of the images."""
        return self._source.shape

    def image(self, number: int) -> NDArray[np.uint8]:
        """Image ``number`` in fewer levels."""
        return reduce_depth(self._source.image(number), self.bit_depth)

    def origin(self, number: int) -> str:
        """As the source says."""
        return self._source.origin(number)

    def reads_alike(self, number: int) -> bool:
        """As the source says."""
        return self._source.reads_alike(number)
