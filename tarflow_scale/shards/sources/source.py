"""`ImageSource`, the interface of all sources of ``prepare``; `EncodedSource`, the base of sources of image files."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from tarflow_scale.config.data import height_and_width
from tarflow_scale.config.prepare import SourceConfig
from tarflow_scale.errors import DataError
from tarflow_scale.shards.events import EventType, ImageEvent
from tarflow_scale.shards.images import Reading, decode_image, image_size, reduce_depth, resize_center_crop

__all__ = ["BadImage", "EncodedSource", "ImageSource", "reading_of"]

_SAMPLED = 64
"""Number of images that are read before packing, to determine the image size and whether images have colours."""


class BadImage(DataError):
    """One image of a source cannot be used; the others may be fine."""


def reading_of(config: SourceConfig) -> Reading:
    """The settings of a source that control how image files are decoded to pixels."""
    return Reading(orientation=config.orientation, transparency=config.transparency)


class ImageSource(ABC):
    """Labelled images with random access: each image is read by its number.

    An open source knows the number, the classes and the format of its images. Therefore, `prepare` can split and order
    the images before it packs them. A source can be pickled, so that worker processes can read from it. Subclasses set
    the attributes in their constructor.
    """

    name: str
    """Name of the data set."""
    description: str
    """Where the images came from, for the manifest."""
    class_names: tuple[str, ...]
    """Names of the classes, in the order of their labels; empty if there are no labels."""
    labels: NDArray[np.int64]
    """Label of every image, ``(n,)``; all zeros if there are no labels."""
    digest: str
    """SHA-256 of the content of the source, so that a changed source results in a different data set. For files that
    are not read before packing, such as the files of a folder, it covers only names and sizes."""
    version: str = ""
    """Like `digest`, but also changes if a file is rewritten with the same size, so that an interrupted packing does
    not resume with different images. Empty if `digest` already detects such changes."""
    bit_depth: int = 8
    """Number of bits per uint8 pixel that contain data; they are the most significant bits."""
    official: NDArray[np.int8] | None = None
    """Split of every image, as an index into `splits.PACKED`, ``(n,)``; None if the source has no official split."""
    reading: Reading | None = None
    """How image files are decoded to pixels; None if the source does not read image files."""
    is_remote: bool = False
    """Whether every image is read from a URL, so that parallel reads are faster."""
    ignored: Mapping[str, int] = MappingProxyType({})
    """Number of files of the source that are not read, by kind."""
    lines: Sequence[str] = ()
    """Lines to be printed: how splits and classes were found, what is left out, and warnings."""
    _reduces: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of the images."""
        channels, height, width = self.image(0).shape
        return channels, height, width

    @property
    def event(self) -> EventType:
        """The type of the samples."""
        return ImageEvent(self.shape, self.bit_depth)

    def image(self, number: int) -> NDArray[np.uint8]:
        """Image ``number`` as ``(C, H, W)`` uint8; a source of vectors returns the bytes of a vector in this form.

        Raises:
            BadImage: the image cannot be used.
        """
        return reduce_depth(self._image(number), self.bit_depth) if self._reduces else self._image(number)

    @abstractmethod
    def _image(self, number: int) -> NDArray[np.uint8]:
        """Image ``number`` at the full bit depth of the source."""

    def origin(self, number: int) -> str:
        """The name of image ``number`` within the source."""
        return f"{self.name}/{number}"

    def keep_bits(self, bit_depth: int) -> None:
        """Keep only the high bits of pixels, as Glow does at high resolution (arXiv 1807.03039, section 6).

        Raises:
            DataError: the source has fewer bits.
        """
        if bit_depth > self.bit_depth:
            raise DataError(
                f"source.bit_depth must not exceed the bit depth of the source (got {bit_depth} for "
                f"{self.bit_depth}-bit {self.name}); lower or remove it"
            )
        if bit_depth < self.bit_depth:
            self.description = f"{self.description}; {bit_depth} of {self.bit_depth} bits kept"
            self.bit_depth, self._reduces = bit_depth, True

    def check_labels(self) -> None:
        """Check that there are images, and that every label is the number of a class.

        Raises:
            DataError: there are no images, or a label is not the number of a class.
        """
        if not len(self.labels):
            raise DataError(f"no images in {self.name} ({self.description}); check source.path")
        lowest, highest = int(self.labels.min()), int(self.labels.max())
        if lowest < 0 or (self.class_names and highest >= len(self.class_names)):
            raise DataError(
                f"labels of {self.name} must be class numbers from 0 to {len(self.class_names) - 1} "
                f"(got {lowest if lowest < 0 else highest}); correct the labels or the list of classes"
            )


class EncodedSource(ImageSource):
    """A source of encoded images, which are decoded by `decode_image` and converted to one shape.

    Args:
        config: the size of the packed images, and how images of another size are treated.
    """

    def __init__(self, config: SourceConfig) -> None:
        self._config = config
        self.reading = reading_of(config)
        self._shape: tuple[int, int, int] | None = None

    @abstractmethod
    def encoded(self, number: int) -> bytes:
        """The encoded bytes of image ``number``."""

    def place(self, number: int) -> str:
        """Path or URL of image ``number``, for error messages."""
        return self.origin(number)

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of the images."""
        assert self._shape is not None
        return self._shape

    def _describe(self, *parts: str) -> None:
        """Set the description: the kind of source, its splits, and how images are read."""
        config = self._config
        turned = "turned upright" if config.orientation == "apply" else "orientation tags ignored"
        over = "refused" if config.transparency == "refuse" else f"over {config.transparency}"
        size = "in their size"
        if config.resize == "center_crop" and config.size_pixels is not None:
            height, width = height_and_width(config.size_pixels)
            to = f"short side to {height}" if height == width else f"scaled to cover {height}x{width}"
            size = f"{to} pixels ({config.resample}), then centre crop"
        self.description = ", ".join([*filter(None, parts), turned, f"transparency {over}", size])

    def _settle_shape(self) -> None:
        """Determine the shape of the packed images from a few images, evenly spaced in the source.

        If any of these has colours, all become RGB. Without ``size_pixels``, the most frequent size among these images
        is used; of equally frequent sizes, the first.
        """
        self.check_labels()
        skip_bad = self._config.bad_images == "skip"
        shapes: dict[int, tuple[int, int, int]] = {}
        first_fault = None
        for number in np.unique(np.linspace(0, len(self) - 1, min(_SAMPLED, len(self))).astype(int)).tolist():
            try:
                shapes[number] = image_size(self.encoded(number), self.place(number), self.reading)
            except DataError as error:
                first_fault = first_fault or error
        if first_fault is not None and not skip_bad:
            raise BadImage(str(first_fault)) from first_fault
        if shapes:
            asked, frequent = self._config.size_pixels, Counter(shape[1:] for shape in shapes.values()).most_common(1)
            size = frequent[0][0] if asked is None else height_and_width(asked)
            self._shape = (max(shape[0] for shape in shapes.values()), *size)
        found = False
        for number, shape in shapes.items():
            try:
                if self._config.resize == "refuse":
                    self._check_size(shape, number)
                if not found:
                    self._decoded(number)  # the header may be intact in a file that cannot be decoded
                    found = True
            except BadImage as error:
                if not skip_bad:
                    raise
                first_fault = first_fault or error
        if not found:
            raise BadImage(f"none of the {_SAMPLED} images that were tried can be used, for example: {first_fault}")

    def _check_size(self, shape: tuple[int, ...], number: int) -> None:
        _, height, width = self.shape
        if shape[1:] != (height, width):
            raise BadImage(
                f"all images must have the same size (got {shape[1]}x{shape[2]} for {self.place(number)}, not "
                f"{height}x{width}); set source.resize=center_crop and source.size_pixels"
            )

    def _image(self, number: int) -> NDArray[np.uint8]:
        """Image ``number`` in the shape of the data set.

        Raises:
            BadImage: the image cannot be decoded, has colours in a grey data set, or has another size and
                ``source.resize`` is ``refuse``.
        """
        image, shape, place = self._decoded(number), self.shape, self.place(number)
        if self._config.resize == "center_crop":
            try:
                image = resize_center_crop(image, shape[1:], self._config.resample)
            except DataError as error:
                raise BadImage(f"{place}: {error}") from error
        if image.shape[0] == 1 and shape[0] == 3:
            image = image.repeat(3, axis=0)
        if image.shape[0] != shape[0]:
            raise BadImage(
                f"images must be all grey or all coloured (got a colour image, {place}, among grey ones); convert them"
            )
        self._check_size(image.shape, number)
        return image

    def _decoded(self, number: int) -> NDArray[np.uint8]:
        try:
            return decode_image(self.encoded(number), self.place(number), reading=self.reading)
        except DataError as error:
            raise BadImage(str(error)) from error
