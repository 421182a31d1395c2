"""Images to bytes and back."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from tarflow_scale.errors import DataError
from tarflow_scale.flows.likelihood import quantize
from tarflow_scale.shards.images import contact_sheet, decode_image, encode_png, reduce_depth, resize_center_crop


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


def test_contact_sheet_places_images_row_by_row() -> None:
    images = np.stack([np.full((1, 2, 2), value, np.uint8) for value in (10, 20, 30)])
    sheet = decode_image(contact_sheet(images, columns=2, zoom=2), "sheet")
    assert sheet.shape == (1, 14, 14)
    assert sheet[0, 3, 3] == 10
    assert sheet[0, 3, 9] == 20
    assert sheet[0, 9, 3] == 30
    assert sheet[0, 0, 0] == sheet[0, 10, 10] == 255
