"""Sources: the digits, and folders of images."""

import os
from pathlib import Path

import numpy as np
import pytest

from tarflow_scale.config.prepare import SourceConfig
from tarflow_scale.errors import DataError
from tarflow_scale.shards.images import encode_png
from tarflow_scale.shards.sources import open_source


def write(path: Path, shape: tuple[int, int, int], value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_png(np.full(shape, value, np.uint8)))


def folder(path: Path, **options: object) -> SourceConfig:
    return SourceConfig.model_validate({"kind": "folder", "path": str(path), **options})


def test_digits_are_four_bit_and_complete() -> None:
    source = open_source(SourceConfig(kind="digits"))
    assert len(source) == 1797
    assert source.bit_depth == 4
    assert np.bincount(source.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    levels = np.stack([source.image(i) for i in range(len(source))])
    assert (levels % 17 == 0).all()
    assert levels.max() == 255


def test_a_folder_gives_classes_in_alphabetical_order(tmp_path: Path) -> None:
    write(tmp_path / "zebra/a.png", (3, 4, 4), 9)
    write(tmp_path / "ant/b.png", (3, 4, 4), 1)
    write(tmp_path / "ant/deep/c.png", (3, 4, 4), 2)
    (tmp_path / "empty").mkdir()
    source = open_source(folder(tmp_path))
    assert source.class_names == ("ant", "zebra")
    assert source.labels.tolist() == [0, 0, 1]
    assert [source.origin(i) for i in range(3)] == ["ant/b.png", "ant/deep/c.png", "zebra/a.png"]
    assert [int(source.image(i)[0, 0, 0]) for i in range(3)] == [1, 2, 9]


def test_several_sizes_need_a_rule(tmp_path: Path) -> None:
    write(tmp_path / "a/1.png", (3, 8, 8))
    write(tmp_path / "a/2.png", (3, 8, 12))
    with pytest.raises(DataError, match=r"the same size \(got 8x12 for .*2.png, not 8x8\); set source.resize"):
        open_source(folder(tmp_path))
    with pytest.raises(DataError, match=r"the same size \(got 8x8 for .*1.png, not 8x12\); set source.resize"):
        open_source(folder(tmp_path, size_pixels=[8, 12]))
    for size, shape in ((6, (3, 6, 6)), ([6, 9], (3, 6, 9))):
        source = open_source(folder(tmp_path, resize="center_crop", size_pixels=size))
        assert source.image(0).shape == source.image(1).shape == source.shape == shape


def test_rectangles_of_one_size_need_no_rule(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / f"a/{number}.png", (3, 8, 12), number)
    source = open_source(folder(tmp_path))
    assert str(source.event) == "3x8x12 images, 8 bit"
    assert source.image(2).shape == (3, 8, 12)


def test_the_most_frequent_size_is_kept_where_others_are_skipped(tmp_path: Path) -> None:
    for number, width in enumerate((8, 12, 12)):
        write(tmp_path / f"a/{number}.png", (3, 8, width), number)
    source = open_source(folder(tmp_path, bad_images="skip"))
    assert source.shape == source.image(1).shape == (3, 8, 12)
    with pytest.raises(DataError, match=r"the same size \(got 8x8 for .*0.png, not 8x12\)"):
        source.image(0)


def test_the_size_in_the_description_is_that_of_the_crop(tmp_path: Path) -> None:
    write(tmp_path / "a/1.png", (3, 8, 12))
    source = open_source(folder(tmp_path, resize="center_crop", size_pixels="4x2"))
    assert source.description.endswith("scaled to cover 4x2 pixels (lanczos), then centre crop")


def test_a_grey_image_among_coloured_ones_is_coloured(tmp_path: Path) -> None:
    write(tmp_path / "a/1.png", (3, 8, 8))
    write(tmp_path / "a/2.png", (1, 8, 8), 7)
    assert (open_source(folder(tmp_path)).image(1) == 7).all()
    assert open_source(folder(tmp_path)).image(1).shape == (3, 8, 8)


def test_no_folder_and_no_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="must be a folder"):
        open_source(folder(tmp_path / "absent"))
    with pytest.raises(DataError, match="unpack it, or set source.kind=webdataset"):
        open_source(folder(tmp_path / "images.tar"))
    (tmp_path / "class").mkdir()
    (tmp_path / "class/readme.txt").write_text("no image")
    with pytest.raises(DataError, match="no images in"):
        open_source(folder(tmp_path))


def test_fewer_bits_are_another_source_of_the_same_images(tmp_path: Path) -> None:
    write(tmp_path / "a/1.png", (3, 4, 4), 201)
    write(tmp_path / "b/2.png", (3, 4, 4), 3)
    source = open_source(folder(tmp_path, bit_depth=5))
    assert source.bit_depth == 5
    assert [int(source.image(i)[0, 0, 0]) >> 3 for i in range(2)] == [201 >> 3, 0]
    assert source.origin(1) == "b/2.png"
    assert open_source(folder(tmp_path, bit_depth=8)).image(0)[0, 0, 0] == 201
    with pytest.raises(DataError, match=r"must not exceed the bit depth of the source \(got 5 for 4-bit digits\)"):
        open_source(SourceConfig(kind="digits", bit_depth=5))


def test_a_flat_folder_has_no_classes(tmp_path: Path) -> None:
    write(tmp_path / "b.png", (3, 4, 4), 2)
    write(tmp_path / "a.png", (3, 4, 4), 1)
    source = open_source(folder(tmp_path))
    assert source.class_names == ()
    assert [int(source.image(i)[0, 0, 0]) for i in range(2)] == [1, 2]
    write(tmp_path / "c/d.png", (3, 4, 4))
    with pytest.raises(
        DataError, match=r"all be in class folders, or all in one folder \(got a.png beside class folders"
    ):
        open_source(folder(tmp_path))


def test_a_folder_in_a_store(tmp_path: Path) -> None:
    import fsspec

    write(tmp_path / "cat/1.png", (3, 4, 4), 5)
    write(tmp_path / "dog/2.png", (3, 4, 4), 6)
    store = fsspec.filesystem("memory")
    store.put(str(tmp_path), "/folder-test", recursive=True)
    source = open_source(SourceConfig(kind="folder", path="memory://folder-test"))
    assert source.class_names == ("cat", "dog")
    assert [source.origin(i) for i in range(2)] == ["cat/1.png", "dog/2.png"]
    assert [int(source.image(i)[0, 0, 0]) for i in range(2)] == [5, 6]
    store.rm("/folder-test", recursive=True)


@pytest.mark.parametrize("resample", ["lanczos", "box", "bicubic"])
def test_the_filter_is_named_in_the_description(tmp_path: Path, resample: str) -> None:
    write(tmp_path / "a/1.png", (3, 8, 12))
    source = open_source(folder(tmp_path, resize="center_crop", size_pixels=4, resample=resample))
    read = "turned upright, transparency over white"
    assert source.description == f"image folder, {read}, short side to 4 pixels ({resample}), then centre crop"
    assert source.image(0).shape == (3, 4, 4)


def test_colours_count_wherever_they_are(tmp_path: Path) -> None:
    for number in range(20):
        write(tmp_path / f"a/{number:02d}.png", (1 if number == 0 else 3, 8, 8), number)
    source = open_source(folder(tmp_path, bad_images="skip"))
    assert all(source.image(number).shape == (3, 8, 8) for number in range(20))


def test_the_first_image_may_be_one_that_is_skipped(tmp_path: Path) -> None:
    write(tmp_path / "a/1.png", (3, 8, 8))
    (tmp_path / "a/0.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"0.png is empty"):
        open_source(folder(tmp_path))
    assert open_source(folder(tmp_path, bad_images="skip")).shape == (3, 8, 8)
    (tmp_path / "a/1.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"none of the 64 images that were tried can be used"):
        open_source(folder(tmp_path, bad_images="skip"))


def test_a_file_name_that_is_no_text(tmp_path: Path) -> None:
    write(tmp_path / "a/1.png", (3, 8, 8))
    (tmp_path / "a/1.png").rename(tmp_path / os.fsdecode(b"a/\xff.png"))
    assert open_source(folder(tmp_path)).image(0).shape == (3, 8, 8)
