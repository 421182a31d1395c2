"""Types of event. An event is the content of a sample without its label: an image, a vector of numbers, or a latent.

An `EventType` converts between the members of a sample in a tar, the uint8 arrays that loaders carry, and the arrays of
a batch. It also has the texts and settings that differ between images and vectors, so other code can handle both.

A vector of D numbers is stored in NumPy's format, which any WebDataset reader reads: ``{key}.npy`` ``(D,)`` float32.
Its K condition values, if any, are ``{key}.condition.npy`` ``(K,)``. Loaders carry a vector as its bytes, a uint8 array
``(1, 1, 4 (D + K))``, and so handle it like an image.

A latent ``(C, h, w)`` of an autoencoder is stored as ``{key}.npy`` ``(n C, h, w)``: means, then log-variances if the
autoencoder has them (n is 1 or 2). The latent of the mirrored image may be stored as well, as ``{key}.mirrored.npy``.
bfloat16 numbers are stored as the uint16 of their bits.
"""

import io
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import numpy as np
from jaxtyping import Float, UInt8
from numpy.typing import NDArray

from tarflow_scale.config.data import AugmentationConfig, ImageSize, height_and_width, size_of
from tarflow_scale.errors import DataError
from tarflow_scale.randomness import Purpose, raw_words
from tarflow_scale.records import LatentFacts, VectorFacts
from tarflow_scale.shards.images import NPY_FAULTS, Reading, decode_image, image_extension

__all__ = ["EventType", "ImageEvent", "LatentEvent", "VectorEvent", "encode_array", "event_of"]

_VALUES, _CONDITION, _MIRRORED = "npy", "condition.npy", "mirrored.npy"
"""Extensions of members in NumPy's format; the first is also the codec in the manifest."""
_FLOAT = np.dtype("<f4")


class EventType(ABC):
    """Type of the samples of a data set or model. ``str`` gives ``1x8x8 images, 4 bit`` or ``vectors of 2``."""

    noun: ClassVar[str]
    """``images``, ``vectors`` or ``latents``."""
    noises: ClassVar[tuple[str, ...]]
    """Kinds of training noise that suit the events."""
    kind: str
    """Name by which an evaluation protocol selects this type: ``8-bit images``, ``vectors`` or ``latents``."""
    shape: tuple[int, ...]
    """Shape of an event; a batch of B events is ``(B, *shape)``."""
    size: str
    """The shape as text: ``3x32x32`` or ``2 numbers``."""
    carried_shape: tuple[int, int, int]
    """Shape of the uint8 array in which a loader delivers one image or vector."""
    level: float
    """Distance between adjacent stored values on the scale of the model; infinite for vectors and latents, which have
    no levels."""
    can_flip: bool = False
    """Whether `augment` can mirror events."""
    num_conditions: int | None = None
    """Number of condition values of an event; None if there are none."""
    _words: str

    def __str__(self) -> str:
        return self._words

    def __eq__(self, other: object) -> bool:
        return isinstance(other, EventType) and (str(self), self.fields()) == (str(other), other.fields())

    def __hash__(self) -> int:
        return hash(str(self))

    @property
    def shown(self) -> "EventType":
        """The events that users of a model see: images in place of latents."""
        return self

    @abstractmethod
    def codec(self, of_images: str) -> str:
        """Codec that stores the events; ``of_images`` is the codec for images."""

    @abstractmethod
    def content(self, carried: UInt8[np.ndarray, "C H W"]) -> NDArray[np.uint8] | dict[str, bytes]:
        """Convert an event to pixels, or to encoded members by extension, for `tarflow_scale.shards.writer.Sample`."""

    @abstractmethod
    def decode(self, members: Mapping[str, bytes], reading: Reading | None) -> UInt8[np.ndarray, "C H W"]:
        """Decode the members of a sample to the array that loaders carry: an image, or the bytes of a vector.

        Args:
            members: content of the members, by extension.
            reading: how image files from other programs are converted to pixels; None for files of this package.

        Raises:
            DataError: a member is missing or damaged, or has another shape or type.
        """

    def augmented_shape(self, config: AugmentationConfig) -> tuple[int, int, int]:
        """Shape of what `augment` returns."""
        del config
        return self.carried_shape

    def augment(
        self, carried: UInt8[np.ndarray, "C H W"], config: AugmentationConfig, seed: int, epoch: int, sample: int
    ) -> UInt8[np.ndarray, "C H W"]:
        """A random change of an event in training, a function of (seed, epoch, sample)."""
        del config, seed, epoch, sample
        return carried

    @abstractmethod
    def unpack(self, carried: UInt8[np.ndarray, "B C H W"]) -> tuple[NDArray[Any], Float[np.ndarray, "B K"] | None]:
        """Convert a batch to events ``(B, *shape)`` and condition values ``(B, K)`` (None if there are none)."""

    @abstractmethod
    def fields(self) -> dict[str, Any]:
        """The fields of a manifest that describe the event."""


class ImageEvent(EventType):
    """An image ``(C, H, W)`` uint8; only the ``bit_depth`` high bits of a pixel are data."""

    noun, noises = "images", ("uniform", "gaussian")
    can_flip = True

    def __init__(self, shape: tuple[int, int, int], bit_depth: int) -> None:
        self.shape = self.carried_shape = shape
        self.bit_depth = bit_depth
        self.kind = f"{bit_depth}-bit images"
        self.size = "x".join(map(str, shape))
        self.level = 2 / (2**bit_depth - 1)
        self._words = f"{self.size} images, {bit_depth} bit"

    def codec(self, of_images: str) -> str:
        """Return ``of_images``, because the events are images."""
        return of_images

    def content(self, carried: UInt8[np.ndarray, "C H W"]) -> NDArray[np.uint8]:
        """The pixels."""
        return carried

    def decode(self, members: Mapping[str, bytes], reading: Reading | None) -> UInt8[np.ndarray, "C H W"]:
        """The pixels of the first member that is an image."""
        extension = image_extension(members)
        if extension is None:
            raise DataError(f"it has no image (members: {', '.join(sorted(members))})")
        return decode_image(members[extension], f"its .{extension}", self.carried_shape, reading)

    def augmented_shape(self, config: AugmentationConfig) -> tuple[int, int, int]:
        """``(C, H, W)`` of the crop."""
        channels, height, width = self.carried_shape
        return channels, *height_and_width(config.crop_pixels or (height, width))

    def augment(
        self, carried: UInt8[np.ndarray, "C H W"], config: AugmentationConfig, seed: int, epoch: int, sample: int
    ) -> UInt8[np.ndarray, "C H W"]:
        """A crop of the image, perhaps mirrored."""
        if not config.flip and config.crop_pixels is None:
            return carried
        flip, top, left = raw_words(3, Purpose.AUGMENTATION, seed, epoch, sample)
        if config.crop_pixels is not None:
            height, width = height_and_width(config.crop_pixels)
            top, left = top % (carried.shape[1] - height + 1), left % (carried.shape[2] - width + 1)
            carried = carried[:, top : top + height, left : left + width]
        return carried[:, :, ::-1] if config.flip and flip & 1 else carried

    def unpack(self, carried: UInt8[np.ndarray, "B C H W"]) -> tuple[NDArray[np.uint8], None]:
        """The pixels, and None, because images have no condition values."""
        return carried, None

    def fields(self) -> dict[str, Any]:
        """Size, channels and bit depth."""
        channels, height, width = self.carried_shape
        return {"num_channels": channels, "image_size_pixels": size_of(height, width), "bit_depth": self.bit_depth}


class VectorEvent(EventType):
    """A vector ``(D,)`` float32, optionally with condition values ``(K,)`` float32."""

    noun = kind = "vectors"
    noises = ("none",)
    level = math.inf

    def __init__(self, facts: VectorFacts) -> None:
        self._facts = facts
        self.shape = (facts.num_values,)
        self.size = f"{facts.num_values} numbers"
        self.carried_shape = 1, 1, _FLOAT.itemsize * (facts.num_values + facts.num_conditions)
        self.num_conditions = facts.num_conditions or None
        given = f", given {facts.num_conditions} numbers" if facts.num_conditions else ""
        self._words = f"vectors of {facts.num_values}{given}"

    def codec(self, of_images: str) -> str:
        """``npy``, NumPy's format."""
        del of_images
        return _VALUES

    def content(self, carried: UInt8[np.ndarray, "1 1 W"]) -> dict[str, bytes]:
        """One or two members in NumPy's format."""
        values, conditions = self.unpack(carried[None])
        members = {_VALUES: encode_array(values[0].astype(_FLOAT))}
        return members if conditions is None else members | {_CONDITION: encode_array(conditions[0].astype(_FLOAT))}

    def decode(self, members: Mapping[str, bytes], reading: Reading | None) -> UInt8[np.ndarray, "1 1 W"]:
        """The bytes of the vector, followed by the bytes of its condition values."""
        del reading
        parts = [_read(members, _VALUES, (self._facts.num_values,), _FLOAT)]
        if self._facts.num_conditions:
            parts.append(_read(members, _CONDITION, (self._facts.num_conditions,), _FLOAT))
        return np.concatenate(parts).view(np.uint8)[None, None]

    def unpack(
        self, carried: UInt8[np.ndarray, "B 1 1 W"]
    ) -> tuple[Float[np.ndarray, "B D"], Float[np.ndarray, "B K"] | None]:
        """Vectors and condition values, each contiguous in memory."""
        numbers = np.ascontiguousarray(carried).reshape(len(carried), -1).view(_FLOAT)
        values, conditions = np.split(numbers, [self._facts.num_values], axis=1)
        return np.ascontiguousarray(values), np.ascontiguousarray(conditions) if self.num_conditions else None

    def fields(self) -> dict[str, Any]:
        """Lengths of vectors and conditions. A vector of D numbers also counts as one pixel with D channels."""
        of_image = {"num_channels": self._facts.num_values, "image_size_pixels": 1, "bit_depth": 8}
        return of_image | {"vectors": self._facts}


class LatentEvent(EventType):
    """A latent ``(C, h, w)``; in a batch its moments ``(n C, h, w)`` float32, means before log-variances."""

    noun = kind = "latents"
    noises = ("gaussian",)
    level = math.inf

    def __init__(self, facts: LatentFacts) -> None:
        channels, height, width = facts.shape
        self.facts = facts
        self.can_flip = facts.has_mirrored
        self.shape = facts.shape
        self.size = "x".join(map(str, facts.shape))
        self._moments = (2 * channels if facts.has_variance else channels, height, width)
        self._stored = np.dtype({"float16": "<f2", "bfloat16": "<u2", "float32": "<f4"}[facts.dtype])
        self._bytes = math.prod(self._moments) * self._stored.itemsize
        self.carried_shape = 1, 1, self._bytes * (2 if facts.has_mirrored else 1)
        self._words = f"{self.size} latents of {facts.autoencoder[:12]}"

    @property
    def shown(self) -> ImageEvent:
        """The images of the latents."""
        return ImageEvent(self.facts.image_shape, self.facts.bit_depth)

    def codec(self, of_images: str) -> str:
        """NumPy's format."""
        del of_images
        return _VALUES

    def content(self, carried: UInt8[np.ndarray, "1 1 W"]) -> dict[str, bytes]:
        """One or two members in NumPy's format."""
        arrays = carried.reshape(-1, self._bytes).view(self._stored).reshape(-1, *self._moments)
        return {name: encode_array(array) for name, array in zip((_VALUES, _MIRRORED), arrays, strict=False)}

    def decode(self, members: Mapping[str, bytes], reading: Reading | None) -> UInt8[np.ndarray, "1 1 W"]:
        """The bytes of the moments, then of those of the mirrored image."""
        del reading
        names = (_VALUES, _MIRRORED) if self.facts.has_mirrored else (_VALUES,)
        arrays = [_read(members, name, self._moments, self._stored) for name in names]
        return np.concatenate([array.reshape(-1).view(np.uint8) for array in arrays])[None, None]

    def augmented_shape(self, config: AugmentationConfig) -> tuple[int, int, int]:
        """The bytes of one latent."""
        del config
        return 1, 1, self._bytes

    def augment(
        self, carried: UInt8[np.ndarray, "1 1 W"], config: AugmentationConfig, seed: int, epoch: int, sample: int
    ) -> UInt8[np.ndarray, "1 1 W"]:
        """The latent, or with ``flip`` perhaps that of the mirrored image."""
        mirrors = config.flip and self.facts.has_mirrored
        first = self._bytes if mirrors and raw_words(1, Purpose.AUGMENTATION, seed, epoch, sample)[0] & 1 else 0
        return carried[:, :, first : first + self._bytes]

    def unpack(self, carried: UInt8[np.ndarray, "B 1 1 W"]) -> tuple[Float[np.ndarray, "B C H W"], None]:
        """Moments in float32, of the images that are not mirrored."""
        bits = np.ascontiguousarray(carried[:, 0, 0, : self._bytes]).view(self._stored)
        return self.numbers(bits).reshape(len(carried), *self._moments), None

    def numbers(self, stored: NDArray[Any]) -> NDArray[np.float32]:
        """Stored numbers as float32."""
        if self.facts.dtype == "bfloat16":
            return (stored.astype(np.uint32) << 16).view(np.float32)
        return stored.astype(np.float32)

    def fields(self) -> dict[str, Any]:
        """The latents; the first two fields describe them as an image of as many channels."""
        channels, height, width = self.facts.shape
        of_image = {"num_channels": channels, "image_size_pixels": size_of(height, width), "bit_depth": 8}
        return of_image | {"latents": self.facts}


class _Described(Protocol):
    """The fields of manifests, model versions and generation plans that describe their samples."""

    @property
    def num_channels(self) -> int: ...
    @property
    def image_size_pixels(self) -> ImageSize: ...
    @property
    def vectors(self) -> VectorFacts | None: ...
    @property
    def latents(self) -> LatentFacts | None: ...


def event_of(described: _Described, bit_depth: int) -> EventType:
    """The event type that a record describes; ``bit_depth`` applies only to images."""
    if described.vectors is not None:
        return VectorEvent(described.vectors)
    if described.latents is not None:
        return LatentEvent(described.latents)
    return ImageEvent((described.num_channels, *height_and_width(described.image_size_pixels)), bit_depth)


def encode_array(array: NDArray[Any]) -> bytes:
    """An array as a file in NumPy's format."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def _read(members: Mapping[str, bytes], extension: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    if extension not in members:
        raise DataError(f"it has no .{extension} (members: {', '.join(sorted(members))})")
    try:
        array = np.load(io.BytesIO(members[extension]), allow_pickle=False)
    except NPY_FAULTS as error:
        raise DataError(f"its .{extension} cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.shape != shape:
        raise DataError(f"its .{extension} must be {dtype} {shape} (got {array.dtype} {array.shape})")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise DataError(f"its .{extension} must contain only finite numbers")
    return array
