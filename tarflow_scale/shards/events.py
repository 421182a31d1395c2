"""Types of event. An event is the content of a sample without its label: an image, or a vector of numbers.

An `EventType` converts between the members of a sample in a tar, the uint8 arrays that loaders carry, and the arrays of
a batch. It also has the texts and settings that differ between images and vectors, so other code can handle both.

A vector of D numbers is stored in NumPy's format, which any WebDataset reader reads: ``{key}.npy`` ``(D,)`` float32.
Its K condition values, if any, are ``{key}.condition.npy`` ``(K,)``. Loaders carry a vector as its bytes, a uint8 array
``(1, 1, 4 (D + K))``, and so handle it like an image.
"""

import io
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import numpy as np
from jaxtyping import Float, UInt8
from numpy.typing import NDArray

from tarflow_scale.errors import DataError
from tarflow_scale.records import VectorFacts
from tarflow_scale.shards.images import NPY_FAULTS, Reading, decode_image, image_extension

__all__ = ["EventType", "ImageEvent", "VectorEvent", "encode_vector", "event_of"]

_VALUES, _CONDITION = "npy", "condition.npy"
"""Extensions of the members of a vector; the first is also the codec in the manifest."""
_FLOAT = np.dtype("<f4")


class EventType(ABC):
    """Type of the samples of a data set or model. ``str`` gives ``1x8x8 images, 4 bit`` or ``vectors of 2``."""

    noun: ClassVar[str]
    """``images`` or ``vectors``."""
    noises: ClassVar[tuple[str, ...]]
    """Kinds of training noise that suit the events."""
    kind: str
    """Name by which an evaluation protocol selects this type: ``8-bit images`` or ``vectors``."""
    shape: tuple[int, ...]
    """Shape of an event; a batch of B events is ``(B, *shape)``."""
    size: str
    """The shape as text: ``3x32x32`` or ``2 numbers``."""
    carried_shape: tuple[int, int, int]
    """Shape of the uint8 array in which a loader delivers one image or vector."""
    level: float
    """Distance between adjacent stored values on the scale of the model; infinite for vectors, which have no levels."""
    num_conditions: int | None = None
    """Number of condition values of an event; None if there are none."""
    _words: str

    def __str__(self) -> str:
        return self._words

    def __eq__(self, other: object) -> bool:
        return isinstance(other, EventType) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

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

    @abstractmethod
    def unpack(self, carried: UInt8[np.ndarray, "B C H W"]) -> tuple[NDArray[Any], Float[np.ndarray, "B K"] | None]:
        """Convert a batch to events ``(B, *shape)`` and condition values ``(B, K)`` (None if there are none)."""

    @abstractmethod
    def fields(self) -> dict[str, Any]:
        """The fields of a manifest that describe the event."""


class ImageEvent(EventType):
    """An image ``(C, H, W)`` uint8; only the ``bit_depth`` high bits of a pixel are data."""

    noun, noises = "images", ("uniform", "gaussian")

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

    def unpack(self, carried: UInt8[np.ndarray, "B C H W"]) -> tuple[NDArray[np.uint8], None]:
        """The pixels, and None, because images have no condition values."""
        return carried, None

    def fields(self) -> dict[str, Any]:
        """Size, channels and bit depth."""
        channels, height, _ = self.carried_shape
        return {"num_channels": channels, "image_size_pixels": height, "bit_depth": self.bit_depth}


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
        members = {_VALUES: encode_vector(values[0])}
        return members if conditions is None else members | {_CONDITION: encode_vector(conditions[0])}

    def decode(self, members: Mapping[str, bytes], reading: Reading | None) -> UInt8[np.ndarray, "1 1 W"]:
        """The bytes of the vector, followed by the bytes of its condition values."""
        del reading
        parts = [_read(members, _VALUES, self._facts.num_values)]
        if self._facts.num_conditions:
            parts.append(_read(members, _CONDITION, self._facts.num_conditions))
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


class _Described(Protocol):
    """The fields of manifests, model versions and generation plans that describe their samples."""

    @property
    def num_channels(self) -> int: ...
    @property
    def image_size_pixels(self) -> int: ...
    @property
    def vectors(self) -> VectorFacts | None: ...


def event_of(described: _Described, bit_depth: int) -> EventType:
    """The event type that a record describes; ``bit_depth`` applies only to images."""
    if described.vectors is not None:
        return VectorEvent(described.vectors)
    size = described.image_size_pixels
    return ImageEvent((described.num_channels, size, size), bit_depth)


def encode_vector(values: Float[np.ndarray, " D"]) -> bytes:
    """Encode a vector as a file in NumPy's format."""
    buffer = io.BytesIO()
    np.save(buffer, values.astype(_FLOAT), allow_pickle=False)
    return buffer.getvalue()


def _read(members: Mapping[str, bytes], extension: str, length: int) -> NDArray[np.float32]:
    if extension not in members:
        raise DataError(f"it has no .{extension} (members: {', '.join(sorted(members))})")
    try:
        array = np.load(io.BytesIO(members[extension]), allow_pickle=False)
    except NPY_FAULTS as error:
        raise DataError(f"its .{extension} cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(array, np.ndarray) or array.dtype != _FLOAT or array.shape != (length,):
        raise DataError(f"its .{extension} must be {length} float32 numbers (got {array.dtype} {array.shape})")
    if not np.isfinite(array).all():
        raise DataError(f"its .{extension} must contain only finite numbers")
    return array
