"""What every source of images offers, and the rules that turn encoded images of any size into images of one shape."""

from abc import ABC, abstractmethod
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tarflow_scale.errors import DataError
from tarflow_scale.shards.images import decode_image, reduce_depth, resize_center_crop

__all__ = ["BadImage", "EncodedSource", "ImageSource", "ReducedSource", "Shaping"]


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
        digest: of what the source holds, so that a changed source is another data set.
        official_test: ``(n,)`` bool, which images the source itself sets aside for testing; None when it does not say.
    """

    def __init__(
        self,
        name: str,
        description: str,
        class_names: tuple[str, ...],
        bit_depth: int,
        labels: NDArray[np.int64],
        digest: str,
        official_test: NDArray[np.bool_] | None = None,
    ) -> None:
        self.name = name
        self.description = description
        self.class_names = class_names
        self.bit_depth = bit_depth
        self.labels = labels
        self.digest = digest
        self.official_test = official_test
        self._check_labels()

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def image(self, number: int) -> NDArray[np.uint8]:
        """Image ``number`` as ``(C, H, W)`` uint8.

        Raises:
            BadImage: it cannot be used.
        """

    def origin(self, number: int) -> str:
        """What image ``number`` was called at its source."""
        return f"{self.name}/{number}"

    def _check_labels(self) -> None:
        if not len(self.labels):
            raise DataError(f"no images in {self.name} ({self.description}); check source.path")
        highest = int(self.labels.max())
        if int(self.labels.min()) < 0 or (self.class_names and highest >= len(self.class_names)):
            wrong = int(self.labels.min()) if int(self.labels.min()) < 0 else highest
            raise DataError(
                f"labels of {self.name} must lie in 0..{len(self.class_names) - 1}, the classes that it names "
                f"(got {wrong}); mend its class map"
            )


class Shaping:
    """How an image of any size becomes one of the data set's shape.

    Args:
        size_pixels: side of the square result; None takes the size of the first image.
        resize: ``refuse`` images of another size, or ``center_crop``: short side to the size, then the centre.
        resample: filter of the resizing.
    """

    def __init__(
        self,
        size_pixels: int | None,
        resize: Literal["refuse", "center_crop"],
        resample: Literal["lanczos", "box", "bicubic"],
    ) -> None:
        self.size_pixels = size_pixels
        self.resize = resize
        self.resample: Literal["lanczos", "box", "bicubic"] = resample
        self.shape: tuple[int, int, int] | None = None

    @property
    def words(self) -> str:
        """For the manifest."""
        if self.resize == "refuse":
            return "as they are"
        return f"short side to {self.size_pixels} pixels ({self.resample}), then centre crop"

    def settle(self, first: NDArray[np.uint8], origin: str) -> None:
        """Let the first image decide what is left open."""
        channels, height, width = first.shape
        size = self.size_pixels or height
        if self.resize == "refuse" and (height, width) != (size, size):
            raise DataError(
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
            image = resize_center_crop(image, self.shape[1], self.resample)
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
    """Images that lie somewhere as PNG, JPEG, WebP or BMP files.

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
        official_test: NDArray[np.bool_] | None = None,
    ) -> None:
        super().__init__(name, f"{description}, {shaping.words}", class_names, 8, labels, digest, official_test)
        self._shaping = shaping
        shaping.settle(self._decoded(0), self.place(0))

    @abstractmethod
    def encoded(self, number: int) -> bytes:
        """The bytes of image ``number``."""

    def place(self, number: int) -> str:
        """Where image ``number`` lies, in full, for errors."""
        return self.origin(number)

    def image(self, number: int) -> NDArray[np.uint8]:
        """Image ``number``, in the one shape of the data set."""
        return self._shaping.apply(self._decoded(number), self.place(number))

    def _decoded(self, number: int) -> NDArray[np.uint8]:
        try:
            return decode_image(self.encoded(number), self.place(number))
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
            official_test=source.official_test,
        )
        self._source = source

    def image(self, number: int) -> NDArray[np.uint8]:
        """Image ``number`` in fewer levels."""
        return reduce_depth(self._source.image(number), self.bit_depth)

    def origin(self, number: int) -> str:
        """As the source says."""
        return self._source.origin(number)
