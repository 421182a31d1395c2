"""Encode and decode images, resize them, reduce their bit depth, and draw contact sheets."""

import io
import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageDraw, ImageFile, ImageFont, TiffImagePlugin, UnidentifiedImageError

from tarflow_scale.errors import DataError
from tarflow_scale.records import Record

__all__ = [
    "CODECS",
    "FILE_EXTENSIONS",
    "IMAGE_EXTENSIONS",
    "NPY_FAULTS",
    "Codec",
    "Reading",
    "contact_sheet",
    "decode_image",
    "encode_image",
    "encode_png",
    "image_extension",
    "image_size",
    "reduce_depth",
    "resize_center_crop",
    "to_pillow",
]


Codec = Literal["png", "webp", "jpeg", "raw"]
CODECS: dict[str, str] = {"png": "png", "webp": "webp", "jpeg": "jpg", "raw": "npy"}
"""Extension of image members, by codec. ``raw`` is an array ``(C, H, W)`` in NumPy's format. Only ``jpeg`` is lossy."""
IMAGE_EXTENSIONS = (
    *("png", "jpg", "jpeg", "webp", "npy", "bmp", "jfif", "jpe", "tif", "tiff", "avif"),
    *("ppm", "pgm", "pbm", "pnm"),
)
"""Extensions of members that are read as images; if a sample has more than one, the first in this order is read."""
FILE_EXTENSIONS = tuple(extension for extension in IMAGE_EXTENSIONS if extension != "npy")
"""Extensions of image files in folders. ``npy`` is left out, because an array in a folder need not be an image."""


class Reading(Record):
    """How image files from other programs are converted to pixels.

    Grey images stay grey; all other images (such as palettes and CMYK) become RGB. Colour profiles are not applied.
    """

    orientation: Literal["apply", "ignore"] = "apply"
    """``apply`` rotates an image as its EXIF (or XMP) tag says, as viewers do; ``ignore`` reads it as it is stored."""
    transparency: Literal["white", "black", "refuse"] = "white"
    """Background colour of transparent pixels; ``refuse`` rejects images with transparent pixels. An alpha channel that
    is opaque everywhere is accepted."""


def image_extension(members: Mapping[str, bytes]) -> str | None:
    """Extension of the image among the members of a sample; None if there is no image."""
    for extension in IMAGE_EXTENSIONS:
        if extension in members:
            return extension
    return None


_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM", "GIF", "TIFF", "AVIF")
"""Formats that Pillow tries, the most frequent first."""
_MAX_PIXELS = 89_478_485
"""Maximum number of pixels (9,459 x 9,459), checked before an image is decoded; Pillow warns above it."""
_NAME_PIXELS, _NAME_PART, _NAME_LETTERS = 12, 30, 20
"""Class names on a sheet are cut to 20 letters. They are at least 12 pixels high, and at least a thirtieth of the width
of the sheet, so that they stay readable if a wide sheet is scaled down."""
_FAULTS = (
    *(OSError, ValueError, SyntaxError, OverflowError, MemoryError, Image.DecompressionBombError),
    *(KeyError, IndexError, TypeError, RuntimeError, struct.error),  # damaged tags of TIFF and EXIF, damaged AVIF
)
"""Errors that Pillow raises for damaged files."""
_GREY = ("1", "L", "LA", "La")
"""Pillow's modes of grey images."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The operation that makes an image upright, by the value of its EXIF orientation tag (CIPA DC-008, 4.6.4)."""
_BACK = _TURNS | {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
_SIDEWAYS = (5, 6, 7, 8)
"""Values of the orientation tag for which height and width are exchanged."""
NPY_FAULTS = (
    *(ValueError, TypeError, KeyError, OSError, EOFError, SyntaxError, RuntimeError, MemoryError, OverflowError),
    *(tokenize.TokenError, zipfile.BadZipFile, zlib.error),
)
"""Errors that NumPy raises for damaged .npy and .npz files."""


def encode_image(image: NDArray[np.uint8], codec: Codec, quality: int = 95) -> bytes:
    """Encode an image ``(C, H, W)`` uint8 with 1 or 3 channels; ``quality`` (1 to 100) is used only by ``jpeg``."""
    buffer = io.BytesIO()
    match codec:
        case "png":
            to_pillow(image).save(buffer, "PNG", compress_level=6)
        case "webp":
            to_pillow(image).save(buffer, "WEBP", lossless=True, method=4)
        case "jpeg":
            to_pillow(image).save(buffer, "JPEG", quality=quality, subsampling=0)
        case "raw":
            np.save(buffer, np.ascontiguousarray(image), allow_pickle=False)
    return buffer.getvalue()


def encode_png(image: NDArray[np.uint8]) -> bytes:
    """Encode an image ``(C, H, W)`` uint8 with 1 or 3 channels as PNG."""
    return encode_image(image, "png")


def to_pillow(image: NDArray[np.uint8]) -> Image.Image:
    """Convert an image ``(C, H, W)`` uint8 with 1 or 3 channels to a Pillow image."""
    return Image.fromarray(image[0] if image.shape[0] == 1 else image.transpose(1, 2, 0))


def decode_image(
    content: bytes, origin: str, shape: tuple[int, int, int] | None = None, reading: Reading | None = None
) -> NDArray[np.uint8]:
    """Decode an image to ``(C, H, W)`` uint8, with one channel if it is grey, else RGB.

    The array is read-only and may have any memory order. The size is checked before pixels are decoded.

    Args:
        content: an image file, or an array ``(C, H, W)`` in NumPy's format.
        origin: name of the image, for messages.
        shape: the required shape; None accepts any shape. A grey image becomes RGB if ``shape`` has three channels.
        reading: how image files from other programs are converted to pixels; None for files that `encode_image` wrote.

    Raises:
        DataError: the content is not an image, or the image is too large, has another shape, or has channels that
            Pillow cannot convert to 8 bits. With a ``reading``, also if the image has several frames, or transparent
            pixels that the reading refuses.
    """
    if content.startswith(b"\x93NUMPY"):
        return _decode_array(content, origin, shape)
    try:
        image = _opened(content, origin, reading)
        _, height, width = _shape_of(image, reading)
        if shape is not None and (height, width) != shape[1:]:
            raise DataError(
                f"{origin} must have {shape[1]}x{shape[2]} pixels (got {height}x{width}); pack the data set again"
            )
        mode, kind = "L" if image.mode in _GREY else "RGB", image.format
        if reading is not None:
            image = _read(image, reading, mode, origin)
        pixels = (image if image.mode == mode else image.convert(mode)).tobytes()
    except _FAULTS as error:
        raise _undecodable(origin, error) from error
    decoded = np.frombuffer(pixels, np.uint8).reshape(height, width, len(mode)).transpose(2, 0, 1)
    if shape is not None and decoded.shape[0] != shape[0]:
        if kind == "WEBP" and shape[0] == 1 and (decoded == decoded[:1]).all():  # WebP has no grey images
            decoded = decoded[:1]
        elif (decoded.shape[0], shape[0]) == (1, 3):
            decoded = decoded.repeat(3, axis=0)
        else:
            raise DataError(
                f"{origin} has a wrong number of channels (got {decoded.shape[0]}, not {shape[0]}); pack the "
                f"data set again"
            )
    return decoded


def _read(image: Image.Image, reading: Reading, mode: str, origin: str) -> Image.Image:
    """Apply the settings of a `Reading` to an image: rotate it, and replace transparent pixels."""
    turn, kind = _orientation(image), image.format
    if image.has_transparency_data:
        alpha = image.convert("RGBA")
        opacity = alpha.getchannel("A")
        if opacity.getextrema() != (255, 255):
            if reading.transparency == "refuse":
                raise DataError(
                    f"{origin} has transparent pixels (got source.transparency=refuse); set source.transparency=white "
                    f"or black"
                )
            ground = Image.new(mode, alpha.size, reading.transparency)
            ground.paste(alpha.convert(mode), mask=opacity)
            image = ground
    if kind == "TIFF":  # Pillow rotates TIFFs on its own
        return image.transpose(_BACK[turn]) if reading.orientation == "ignore" and turn in _BACK else image
    return image.transpose(_TURNS[turn]) if reading.orientation == "apply" and turn in _TURNS else image


def _orientation(image: Image.Image) -> int:
    """The value of the orientation tag; 1 (upright) if the tag is missing or cannot be read."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
        return value if value in range(1, 9) else 1
    except _FAULTS:  # viewers show an image with a damaged EXIF block as it is stored
        return 1


def _decode_array(content: bytes, origin: str, shape: tuple[int, int, int] | None) -> NDArray[np.uint8]:
    try:
        image = np.load(io.BytesIO(content), allow_pickle=False)
    except NPY_FAULTS as error:
        raise _undecodable(origin, error) from error
    is_image = image.dtype == np.uint8 and image.ndim == 3 and image.shape[0] in (1, 3)
    if not is_image or image.shape != (shape or image.shape):
        raise DataError(
            f"{origin} must be a uint8 array {shape or '(1 or 3, H, W)'} (got {image.dtype} {image.shape}); pack the "
            f"data set again"
        )
    return image


def image_size(content: bytes, origin: str, reading: Reading | None = None) -> tuple[int, int, int]:
    """The shape ``(C, H, W)`` that `decode_image` would return for an image, read from its header and tags.

    Raises:
        DataError: the content is not an image, or its size, bit depth or number of frames is refused.
    """
    if content.startswith(b"\x93NUMPY"):
        channels, height, width = _decode_array(content, origin, None).shape
        return channels, height, width
    try:
        with _opened(content, origin, reading) as image:
            return _shape_of(image, reading)
    except _FAULTS as error:
        raise _undecodable(origin, error) from error


def _shape_of(image: Image.Image, reading: Reading | None) -> tuple[int, int, int]:
    """Shape ``(C, H, W)`` after decoding. Pillow reports the upright size of TIFFs, but the stored size of others."""
    channels = 1 if image.mode in _GREY else 3
    width, height = image.size
    is_turned = reading is not None and (reading.orientation == "ignore") == (image.format == "TIFF")
    if is_turned and _orientation(image) in _SIDEWAYS:
        return channels, width, height
    return channels, height, width


def _opened(content: bytes, origin: str, reading: Reading | None) -> Image.Image:
    """Open an image file, and check its header."""
    if not content:
        raise DataError(f"{origin} is empty (0 bytes); replace or remove the image")
    image = Image.open(io.BytesIO(content), formats=_FORMATS)
    if image.width * image.height > _MAX_PIXELS:
        raise DataError(f"{origin} is too large ({image.width}x{image.height} pixels); shrink or remove it")
    if image.mode.startswith(("I", "F")) or (reading is not None and _is_deep(image)):
        raise DataError(f"{origin} has more than 8 bits per channel (mode {image.mode}); convert it to 8 bits")
    is_photo = image.format in ("JPEG", "MPO")  # of the pictures in a phone's JPEG (MPO), only the main one counts
    if reading is not None and not is_photo and (frames := getattr(image, "n_frames", 1)) > 1:
        raise DataError(f"{origin} has {frames} frames or pages; save one of them as a single image, or remove it")
    return image


def _is_deep(image: ImageFile.ImageFile) -> bool:
    """Whether Pillow would convert the channels of an image to 8 bits incorrectly, by keeping only the high byte.

    This is true for TIFFs with signed channels or more than 8 bits: in scientific files, the high byte is often empty.
    For 16-bit PNGs, the high byte is correct, because their colours use the whole range. The exception is a PNG that
    declares a transparent colour, because Pillow compares this colour with the high bytes.
    """
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return "transparency" in image.info and any(";16" in str(tile) for tile in getattr(image, "tile", ()))
    bits = image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (1,))
    signs = image.tag_v2.get(TiffImagePlugin.SAMPLEFORMAT, (1,))
    return max(bits) > 8 or any(sign not in (1, 4) for sign in signs)  # 1 unsigned, 4 undefined


def _undecodable(origin: str, error: Exception) -> DataError:
    # Pillow's message has the address of the buffer, which differs in every run.
    reason = "unknown image format" if isinstance(error, UnidentifiedImageError) else " ".join(str(error).split())
    return DataError(f"{origin} cannot be decoded ({reason or type(error).__name__}); replace or remove the image")


def resize_center_crop(
    image: NDArray[np.uint8], size: tuple[int, int], resample: Literal["lanczos", "box", "bicubic"] = "lanczos"
) -> NDArray[np.uint8]:
    """Resize an image ``(C, H, W)``, with its aspect ratio, until it just covers a size, then crop the centre.

    Args:
        image: the image.
        size: height and width of the result in pixels.
        resample: filter.

    Raises:
        DataError: the image is so long and narrow that the resized image would be too large.
    """
    (_, height, width), (rows, columns) = image.shape, size
    scale = max(rows / height, columns / width)
    new_height, new_width = max(rows, round(height * scale)), max(columns, round(width * scale))
    if new_height * new_width > _MAX_PIXELS:
        raise DataError(
            f"an image must not exceed {_MAX_PIXELS:,} pixels when it is resized to cover {rows}x{columns} (got "
            f"{height}x{width}, resized {new_height}x{new_width}); remove it"
        )
    resized = np.asarray(to_pillow(image).resize((new_width, new_height), Image.Resampling[resample.upper()]))
    top, left = (new_height - rows) // 2, (new_width - columns) // 2
    cropped = resized[top : top + rows, left : left + columns]
    return cropped[None] if cropped.ndim == 2 else np.ascontiguousarray(cropped.transpose(2, 0, 1))


def reduce_depth(image: NDArray[np.uint8], bit_depth: int) -> NDArray[np.uint8]:
    """Keep the ``bit_depth`` high bits of 8-bit pixels, and spread the 2^bit_depth levels evenly over 0..255."""
    levels = image >> (8 - bit_depth)
    return np.round(levels * (255 / (2**bit_depth - 1))).astype(np.uint8)


def contact_sheet(images: NDArray[np.uint8], columns: int, zoom: int = 1, names: Sequence[str] | None = None) -> bytes:
    """Draw a sheet of images with white borders, as PNG.

    Args:
        images: the images, ``(B, C, H, W)`` uint8.
        columns: number of images in a row.
        zoom: factor by which the images are enlarged.
        names: class name of each image. If each column has one class, its name is above the column; else a name is
            above each image.
    """
    num, channels, height, width = images.shape
    rows = -(-num // columns)
    sheet = np.full((channels, rows * (height + 1) + 1, columns * (width + 1) + 1), 255, dtype=np.uint8)
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + 1) + 1, (i % columns) * (width + 1) + 1
        sheet[:, top : top + height, left : left + width] = image
    sheet = sheet.repeat(zoom, axis=1).repeat(zoom, axis=2)
    if names is None or not num:
        return encode_png(sheet)
    bands = [sheet]
    if any(name != names[i % columns] for i, name in enumerate(names)):
        bands = np.split(sheet[:, zoom:], rows, axis=1)
    shown = [names[row * columns : (row + 1) * columns] for row in range(len(bands))]
    strips = _strips(shown, (width + 1) * zoom, sheet.shape[2])
    parts = [part for strip, band in zip(strips, bands, strict=True) for part in (strip.repeat(channels, axis=0), band)]
    return encode_png(np.concatenate(parts, axis=1))


def _strips(rows: Sequence[Sequence[str]], cell: int, width: int) -> list[NDArray[np.uint8]]:
    """Draw a strip ``(1, h, width)`` of names for each row; a cell is ``cell`` pixels wide. Long names are vertical."""
    size = max(_NAME_PIXELS, width // _NAME_PART)
    font = ImageFont.load_default(size)
    short = [[name if len(name) <= _NAME_LETTERS else f"{name[: _NAME_LETTERS - 2]}.." for name in row] for row in rows]
    longest = max(font.getlength(name) for row in short for name in row)
    upright = longest > cell - 2
    height = math.ceil(longest) + 6 if upright else size + 6
    strips: list[NDArray[np.uint8]] = []
    for row in short:
        strip = Image.new("L", (width, height), 255)
        for column, name in enumerate(row):
            text = Image.new("L", (math.ceil(font.getlength(name)) + 2, size + 5), 255)
            ImageDraw.Draw(text).text((1, 0), name, fill=0, font=font)
            text = text.rotate(90, expand=True, fillcolor=255) if upright else text
            strip.paste(text, (column * cell + (cell - text.width) // 2 + 1, height - text.height))
        strips.append(np.asarray(strip)[None])
    return strips
