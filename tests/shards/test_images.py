"""Images to bytes and back."""

import io
import struct
import zlib
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from PIL import Image

from tarflow_scale.errors import DataError
from tarflow_scale.flows.likelihood import quantize
from tarflow_scale.shards.images import (
    contact_sheet,
    decode_image,
    encode_png,
    image_size,
    reduce_depth,
    resize_center_crop,
)


@pytest.mark.parametrize("channels", [1, 3])
def test_png_is_lossless(channels: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (channels, 9, 5), np.uint8)
    assert (decode_image(encode_png(image), "x") == image).all()


@pytest.mark.parametrize("mode", ["RGBA", "P", "CMYK"])
def test_other_modes_become_rgb(mode: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (10, 20, 30)).convert(mode).save(buffer, "TIFF" if mode == "CMYK" else "PNG")
    assert decode_image(buffer.getvalue(), "x").shape == (3, 4, 4)


@pytest.mark.parametrize("content", [b"", b"not an image", encode_png(np.zeros((1, 8, 8), np.uint8))[:40]])
def test_what_is_no_image_is_named(content: bytes) -> None:
    with pytest.raises(DataError, match=r"some/file.png (cannot be decoded|is empty \(0 bytes\))"):
        decode_image(content, "some/file.png")


def npy_that_declares(shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [npy_that_declares((3, 100_000, 100_000)), b"\x93NUMPY\x01\x00v\x00{'descr': (" + b" " * 100, b"\x93NUMPY"],
    ids=["huge", "unfinished header", "no header"],
)
def test_arrays_that_are_none_are_named(content: bytes) -> None:
    with pytest.raises(DataError, match="x cannot be decoded"):
        decode_image(content, "x")


def png_that_declares(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("width", "height"), [(9_500, 9_500), (89_478_486, 1), (100_000, 100_000)])
def test_an_image_bomb_is_refused_by_its_header(width: int, height: int) -> None:
    content = png_that_declares(width, height)
    with pytest.raises(DataError, match=r"x (is too large|cannot be decoded \(Image size)"):
        image_size(content, "x")


def test_a_thread_is_not_resized() -> None:
    with pytest.raises(DataError, match=r"must not be a thread \(got 1x1000000 pixels for 64x64\)"):
        resize_center_crop(np.zeros((3, 1, 1_000_000), np.uint8), 64)


def test_the_same_fault_has_the_same_words() -> None:
    words = set()
    for _ in range(3):
        with pytest.raises(DataError) as caught:
            decode_image(b"not an image", "x")
        words.add(str(caught.value))
    assert words == {"x cannot be decoded (no image format); replace or remove the image"}


@pytest.mark.parametrize(("height", "width"), [(40, 60), (60, 40), (7, 9), (32, 32)])
def test_crop_takes_the_centre_of_the_short_side(height: int, width: int) -> None:
    row, column = np.mgrid[0:height, 0:width]
    image = np.stack([row * 255 / height, column * 255 / width, row * 0]).astype(np.uint8)
    square = resize_center_crop(image, 16)
    assert square.shape == (3, 16, 16)
    assert abs(float(square[0].mean()) - float(image[0].mean())) < 8  # centred, to half a pixel
    assert abs(float(square[1].mean()) - float(image[1].mean())) < 8


@pytest.mark.parametrize("bits", range(1, 9))
def test_fewer_bits_are_the_high_ones_spread_over_the_range(bits: int) -> None:
    image = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    reduced = reduce_depth(image, bits)
    assert (reduced >> (8 - bits) == image >> (8 - bits)).all()
    assert len(np.unique(reduced)) == 2**bits
    assert (reduced.min(), reduced.max()) == (0, 255)
    stored = quantize(torch.from_numpy(image >> (8 - bits))[None] * (2 / (2**bits - 1)) - 1, bits, "nearest")
    assert (stored[0].numpy() == reduced).all()  # what generated images look like


@pytest.mark.parametrize(
    ("names", "columns", "strips"),
    [
        ("0123456789" * 2, 10, 1),  # a column holds one class, so one line of names says it
        (["a name that is longer than a cell", *"bcd"] * 2, 4, 1),
        ("abcabcab", 4, 2),  # else every image has its own
    ],
)
def test_samples_are_labelled_by_class(names: Sequence[str], columns: int, strips: int) -> None:
    images = np.full((len(names), 3, 8, 8), 128, np.uint8)
    bare = decode_image(contact_sheet(images, columns, 4), "bare")
    named = decode_image(contact_sheet(images, columns, 4, list(names)), "named")
    assert named.shape[2] == bare.shape[2]
    grey = (named == 128).all(axis=(0, 2)) | (named == 128).any(axis=(0, 2))
    above = ~grey & (named < 100).any(axis=(0, 2))  # rows of pixels with letters
    runs = int((np.diff(above.astype(int), prepend=0) == 1).sum())
    starts = int((np.diff(grey.astype(int), prepend=0) == 1).sum())
    assert runs >= strips
    assert starts == len(names) // columns
    first_image = int(np.argmax(grey))
    assert above[:first_image].any()
    letters = named[:, :first_image] < 100
    cell = 9 * 4
    assert all(letters[:, :, column * cell : (column + 1) * cell].any() for column in range(columns))
    assert (named == 128).sum() == (bare == 128).sum()  # no letter covers an image


def test_contact_sheet_places_images_row_by_row() -> None:
    images = np.stack([np.full((1, 2, 2), value, np.uint8) for value in (10, 20, 30)])
    sheet = decode_image(contact_sheet(images, columns=2, zoom=2), "sheet")
    assert sheet.shape == (1, 14, 14)
    assert sheet[0, 3, 3] == 10
    assert sheet[0, 3, 9] == 20
    assert sheet[0, 9, 3] == 30
    assert sheet[0, 0, 0] == sheet[0, 10, 10] == 255
