"""Images to bytes and back, losslessly; bytes of tar members to samples."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tarflow_scale.errors import DataError

__all__ = ["contact_sheet", "decode_image", "encode_png", "reduce_depth", "resize_center_crop"]


def encode_png(image: NDArray[np.uint8]) -> bytes:
    """Lossless PNG of an image ``(C, H, W)`` uint8 with 1 or 3 channels."""
    buffer = io.BytesIO()
    pixels = image[0] if image.shape[0] == 1 else image.transpose(1, 2, 0)
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=6)
    return buffer.getvalue()


def decode_image(content: bytes, origin: str) -> NDArray[np.uint8]:
    """Decode to ``(C, H, W)`` uint8; grey images have one channel, all others become RGB.

    Raises:
        DataError: when the bytes are not an image.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.mode.startswith(("I", "F")):
                raise DataError(f"{origin} has more than 8 bits a channel (mode {image.mode}); convert it to 8 bits")
            pixels = np.asarray(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{origin} cannot be decoded ({error}); replace or remove the image") from error
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def resize_center_crop(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Bring the short side of ``(C, H, W)`` to ``size`` pixels with Lanczos, then crop the centre to a square."""
    _, height, width = image.shape
    scale = size / min(height, width)
    new_height, new_width = max(size, round(height * scale)), max(size, round(width * scale))
    pixels = image[0] if image.shape[0] == 1 else image.transpose(1, 2, 0)
    resized = np.asarray(Image.fromarray(pixels).resize((new_width, new_height), Image.Resampling.LANCZOS))
    top, left = (new_height - size) // 2, (new_width - size) // 2
    cropped = resized[top : top + size, left : left + size]
    return cropped[None] if cropped.ndim == 2 else np.ascontiguousarray(cropped.transpose(2, 0, 1))


def reduce_depth(image: NDArray[np.uint8], bit_depth: int) -> NDArray[np.uint8]:
    """Keep the ``bit_depth`` high bits of 8-bit pixels; the 2^bit_depth levels are spread evenly over 0..255."""
    levels = image >> (8 - bit_depth)
    return np.round(levels * (255 / (2**bit_depth - 1))).astype(np.uint8)


def contact_sheet(images: NDArray[np.uint8], columns: int, zoom: int = 1) -> bytes:
    """A PNG of images ``(B, C, H, W)`` uint8 in rows of ``columns``, each pixel ``zoom`` wide, on a white border."""
    num, channels, height, width = images.shape
    rows = -(-num // columns)
    sheet = np.full((channels, rows * (height + 1) + 1, columns * (width + 1) + 1), 255, dtype=np.uint8)
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + 1) + 1, (i % columns) * (width + 1) + 1
        sheet[:, top : top + height, left : left + width] = image
    return encode_png(sheet.repeat(zoom, axis=1).repeat(zoom, axis=2))
