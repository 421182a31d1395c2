"""Encoding, decoding and drawing of images."""

import io
import struct
import zlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image

from tarflow_scale.errors import DataError
from tarflow_scale.flows.likelihood import quantize
from tarflow_scale.shards.images import (
    Reading,
    contact_sheet,
    decode_image,
    encode_png,
    image_size,
    reduce_depth,
    resize_center_crop,
    to_pillow,
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


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


CORNERS = np.kron(np.array([[250, 10, 90], [60, 170, 130]], np.uint8), np.ones((16, 16), np.uint8))
"""A grey image whose eight orientations all differ."""
LOSSLESS = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100}, "AVIF": {"quality": 100}}
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.T,
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).T,
    8: lambda a: np.rot90(a, 1),
}
"""The operation for each value of the tag in CIPA DC-008: 6 is 90 degrees clockwise, 8 counter-clockwise, ..."""


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("tag", range(1, 9))
def test_orientation_tags_are_applied_or_ignored_in_size_and_pixels(format: str, tag: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = tag
    content = saved(Image.fromarray(CORNERS), format, exif=exif, **LOSSLESS.get(format, {}))
    for reading, expected in (
        (Reading(), UPRIGHT[tag](CORNERS)),
        (Reading(orientation="ignore"), CORNERS),
    ):
        image = decode_image(content, "x", reading=reading)
        assert image.shape == image_size(content, "x", reading)
        assert image.shape[1:] == expected.shape
        assert abs(image[0].astype(int) - expected).max() <= 8


def test_a_damaged_exif_block_is_no_orientation() -> None:
    content = saved(Image.fromarray(CORNERS), "PNG", exif=b"Exif\0\0II*\0" + b"\xff" * 20)
    assert np.array_equal(decode_image(content, "x", reading=Reading())[0], CORNERS)


COLOUR, HALF = (200, 100, 50), {"white": (227, 177, 152), "black": (100, 50, 25)}


def rgba(*alpha: int) -> Image.Image:
    pixels = np.empty((1, len(alpha), 4), np.uint8)
    pixels[:] = (*COLOUR, 255)
    pixels[0, :, 3] = alpha
    return Image.fromarray(pixels)


@pytest.mark.parametrize("ground", ["white", "black"])
@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_transparency_lies_over_what_the_setting_says(format: str, ground: Literal["white", "black"]) -> None:
    content = saved(rgba(0, 128, 255), format, **LOSSLESS.get(format, {}))
    pixels = decode_image(content, "x", reading=Reading(transparency=ground))[:, 0].T
    assert pixels[0].tolist() == [255 if ground == "white" else 0] * 3
    assert abs(pixels[1] - np.array(HALF[ground])).max() <= 1
    assert pixels[2].tolist() == list(COLOUR)


TRANSPARENT = {
    "grey with alpha": saved(Image.fromarray(np.array([[[90, 0], [90, 255]]], np.uint8), "LA"), "PNG"),
    "palette": saved(rgba(255, 255).convert("RGB").quantize(2), "PNG", transparency=bytes([0])),
    "a grey level": saved(Image.fromarray(np.array([[7, 90]], np.uint8)), "PNG", transparency=7),
    "a colour": saved(rgba(255, 255).convert("RGB"), "PNG", transparency=COLOUR),
    "GIF": saved(rgba(0, 255), "GIF"),
}


@pytest.mark.parametrize("kind", TRANSPARENT)
def test_every_kind_of_transparency_is_seen(kind: str) -> None:
    content = TRANSPARENT[kind]
    white, black = (decode_image(content, "x", reading=Reading(transparency=over)) for over in ("white", "black"))
    assert set(white[:, 0, 0].tolist()) == {255}
    assert set(black[:, 0, 0].tolist()) == {0}
    assert white.shape == image_size(content, "x", Reading())
    with pytest.raises(
        DataError, match=r"some/file.png has transparent pixels \(got source.transparency=refuse\); set"
    ):
        decode_image(content, "some/file.png", reading=Reading(transparency="refuse"))


@pytest.mark.parametrize(
    "content",
    [
        saved(rgba(255, 255), "PNG"),
        saved(rgba(255, 255), "WEBP", lossless=True),
        saved(rgba(255, 255).convert("RGB").quantize(2), "PNG", transparency=bytes([255, 255])),
        saved(rgba(255, 255).convert("RGB"), "PNG", transparency=(1, 2, 3)),
    ],
    ids=["RGBA", "WebP", "palette", "a colour that does not occur"],
)
def test_an_opaque_alpha_channel_is_no_transparency(content: bytes) -> None:
    reading = Reading(transparency="refuse")
    assert np.array_equal(decode_image(content, "x", reading=reading), decode_image(content, "x"))
    assert decode_image(content, "x", reading=reading)[:, 0, 0].tolist() == list(COLOUR)


def deep_png(key: bytes | None) -> bytes:
    """A PNG of two colours with 16 bits per channel; one of them may be declared transparent."""
    colours = struct.pack(">6H", 0x1234, 0x2345, 0x3456, 0xFFFF, 0xFFFE, 0)
    parts = [(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0" + colours))]
    return png_of([parts[0], *([(b"tRNS", key)] if key else []), parts[1], (b"IEND", b"")])


def png_of(chunks: list[tuple[bytes, bytes]]) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )


GREY = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
DEEP = np.arange(64, dtype=np.uint16).reshape(8, 8) * 40
UNREADABLE = {
    "16-bit grey TIFF": (saved(Image.fromarray(DEEP), "TIFF"), "more than 8 bits"),
    "16-bit RGB TIFF": (saved(GREY.convert("RGB"), "TIFF"), "more than 8 bits"),  # its tag is changed below
    "float TIFF": (saved(Image.fromarray(DEEP.astype(np.float32)), "TIFF"), "more than 8 bits"),
    "16-bit PGM": (b"P5 2 2 65535 " + bytes(8), "more than 8 bits"),
    "float PFM": (b"Pf\n2 2\n-1.0\n" + bytes(16), "more than 8 bits"),
    "16-bit PNG with a transparent colour": (deep_png(struct.pack(">3H", 0x12, 0x23, 0x34)), "more than 8 bits"),
    "pages of a TIFF": (saved(GREY, "TIFF", save_all=True, append_images=[GREY]), "has 2 frames or pages"),
    "animated GIF": (saved(GREY, "GIF", save_all=True, append_images=[Image.new("L", (8, 8))]), "has 2 frames"),
    "animated PNG": (saved(GREY, "PNG", save_all=True, append_images=[Image.new("L", (8, 8))]), "has 2 frames"),
    "animated WebP": (saved(GREY, "WEBP", save_all=True, append_images=[Image.new("L", (8, 8))]), "has 2 frames"),
    "animated AVIF": (saved(GREY, "AVIF", save_all=True, append_images=[Image.new("L", (8, 8))]), "has 2 frames"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_would_be_read_wrong_is_refused_by_its_header(kind: str) -> None:
    content, reason = UNREADABLE[kind]
    if kind == "16-bit RGB TIFF":
        content = rgb_tiff_of_16_bits()
        assert decode_image(content, "x").max() <= 1  # the high bytes: black, without a word
    for look in (image_size, lambda content, origin, reading: decode_image(content, origin, reading=reading)):
        with pytest.raises(DataError, match=f"some/file {reason}" if reason.startswith("has") else reason):
            look(content, "some/file", Reading())


def rgb_tiff_of_16_bits() -> bytes:
    """An uncompressed little-endian TIFF of 2x1 pixels whose values use 9 of 16 bits."""
    pixels = struct.pack("<6H", 500, 400, 300, 200, 100, 0)
    tags = [
        (256, 3, 1, 2), (257, 3, 1, 1), (258, 3, 3, 8 + len(pixels)), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 8),
        (277, 3, 1, 3), (278, 3, 1, 1), (279, 4, 1, len(pixels)),
    ]  # fmt: skip
    bits = struct.pack("<3H", 16, 16, 16)
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    return struct.pack("<2sHI", b"II", 42, 8 + len(pixels) + len(bits)) + pixels + bits + directory


RIGHT = {
    "CMYK": (saved(Image.new("CMYK", (2, 2), (255, 0, 0, 0)), "TIFF"), [0, 255, 255]),
    "CMYK JPEG": (saved(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG", quality=100), [0, 255, 255]),
    "palette": (saved(Image.new("RGB", (2, 2), COLOUR).quantize(2), "PNG"), [*COLOUR]),
    "bilevel": (saved(Image.new("1", (2, 2), 1), "TIFF"), [255]),
    "grey TIFF": (saved(Image.new("L", (2, 2), 77), "TIFF"), [77]),
    "LZW TIFF": (saved(Image.new("RGB", (2, 2), COLOUR), "TIFF", compression="tiff_lzw"), [*COLOUR]),
    "16-bit PNG": (deep_png(None), [0x12, 0x23, 0x34]),
    "PPM with another maximum": (b"P6 1 1 100 \x64\x32\x00", [255, 128, 0]),
    "a phone's two pictures": (
        saved(Image.new("RGB", (8, 8), COLOUR), "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))]),
        [*COLOUR],
    ),
}


@pytest.mark.parametrize("kind", RIGHT)
def test_less_common_files_are_decoded_right(kind: str) -> None:
    content, expected = RIGHT[kind]
    image = decode_image(content, "x", reading=Reading())
    assert image.shape == image_size(content, "x", Reading())
    assert abs(image[:, 0, 0].astype(int) - expected).max() <= 2


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
    return png_of([(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")])


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("width", "height"), [(9_500, 9_500), (89_478_486, 1), (100_000, 100_000)])
def test_an_image_bomb_is_refused_by_its_header(width: int, height: int) -> None:
    content = png_that_declares(width, height)
    with pytest.raises(DataError, match=r"x (is too large|cannot be decoded \(Image size)"):
        image_size(content, "x")


def test_a_thread_is_not_resized() -> None:
    with pytest.raises(DataError, match=r"when it is resized to cover 64x64 \(got 1x1000000, resized"):
        resize_center_crop(np.zeros((3, 1, 1_000_000), np.uint8), (64, 64))


def test_the_same_fault_has_the_same_words() -> None:
    words = set()
    for _ in range(3):
        with pytest.raises(DataError) as caught:
            decode_image(b"not an image", "x")
        words.add(str(caught.value))
    assert words == {"x cannot be decoded (unknown image format); replace or remove the image"}


@pytest.mark.parametrize(("height", "width"), [(40, 60), (60, 40), (7, 9), (32, 32)])
def test_crop_takes_the_centre_of_the_short_side(height: int, width: int) -> None:
    row, column = np.mgrid[0:height, 0:width]
    image = np.stack([row * 255 / height, column * 255 / width, row * 0]).astype(np.uint8)
    square = resize_center_crop(image, (16, 16))
    assert square.shape == (3, 16, 16)
    assert abs(float(square[0].mean()) - float(image[0].mean())) < 8  # centred, to half a pixel
    assert abs(float(square[1].mean()) - float(image[1].mean())) < 8


COVER = {
    "too wide": ((40, 60), (12, 18), (0, 5)),
    "too high": ((60, 30), (16, 8), (2, 0)),
    "of another size alone": ((9, 6), (12, 8), (0, 0)),
    "rounded": ((37, 53), (12, 17), (0, 4)),
    "as it is": ((12, 8), (12, 8), (0, 0)),
}
"""Sizes (height, width) of an image, of what covers 12x8 pixels, and the corner of the crop, by hand."""


@pytest.mark.parametrize("case", COVER)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_rectangle_is_the_centre_of_what_pillow_resizes(case: str, channels: int) -> None:
    (height, width), (rows, columns), (top, left) = COVER[case]
    image = np.random.default_rng(0).integers(0, 256, (channels, height, width), np.uint8)
    resized = to_pillow(image).resize((columns, rows), Image.Resampling.LANCZOS)
    expected = np.asarray(resized.crop((left, top, left + 8, top + 12))).reshape(12, 8, channels)
    assert np.array_equal(resize_center_crop(image, (12, 8)), expected.transpose(2, 0, 1))
    turned = to_pillow(image.transpose(0, 2, 1)).resize((rows, columns), Image.Resampling.LANCZOS)
    expected = np.asarray(turned.crop((top, left, top + 12, left + 8))).reshape(8, 12, channels)
    assert np.array_equal(resize_center_crop(image.transpose(0, 2, 1), (8, 12)), expected.transpose(2, 0, 1))


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
    sheet = decode_image(contact_sheet(images[:, :, :1], columns=2), "sheet")
    assert sheet[0].tolist() == [
        [255] * 7,
        [255, 10, 10, 255, 20, 20, 255],
        [255] * 7,
        [255, 30, 30, *[255] * 4],
        [255] * 7,
    ]
