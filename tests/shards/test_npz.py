"""The npz for ADM's evaluator has the packed images and labels, and appears only when it is complete."""

from pathlib import Path

import numpy as np
import pytest

from tarflow_scale import cli
from tarflow_scale.errors import DataError
from tarflow_scale.shards.images import encode_png
from tarflow_scale.shards.npz import write_npz
from tarflow_scale.shards.reader import ShardSet


def test_it_holds_images_in_order_with_three_channels_and_labels(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "digits.npz"
    assert cli.main(["prepare", "--npz", str(digits / "test"), str(target)]) == 0
    assert "359 images" in capsys.readouterr().out
    with np.load(target, allow_pickle=False) as file:
        images, labels = file["arr_0"], file["arr_1"]
    batch = next(ShardSet(str(digits / "test")).batches(0, 359, 359))
    assert images.dtype == np.uint8
    assert images.shape == (359, 8, 8, 3)
    for channel in range(3):
        assert (images[..., channel] == batch.events[:, 0]).all()
    assert (labels == batch.labels).all()


def test_rectangles_keep_their_height_and_width(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 6, 4), np.uint8)
    for number, image in enumerate(images):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / f"images/{number}.png").write_bytes(encode_png(image))
    arguments = ["source.kind=folder", f"source.path={tmp_path}/images", "split.test_fraction=0"]
    assert cli.main(["prepare", *arguments, f"shards.path={tmp_path}/data"]) == 0
    assert write_npz(f"{tmp_path}/data/train", f"{tmp_path}/out.npz") == 5
    packed = ShardSet(f"{tmp_path}/data/train").take(np.arange(5)).events
    with np.load(tmp_path / "out.npz") as file:
        assert np.array_equal(file["arr_0"], packed.transpose(0, 2, 3, 1))
    assert sorted(map(bytes, packed)) == sorted(map(bytes, images))


def test_a_damaged_data_set_leaves_no_file(digits: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(digits / "test", tmp_path / "test")
    tar = next((tmp_path / "test").glob("*.tar"))
    content = bytearray(tar.read_bytes())
    content[len(content) // 2] ^= 1
    tar.write_bytes(bytes(content))
    with pytest.raises(DataError):
        write_npz(str(tmp_path / "test"), str(tmp_path / "out.npz"))
    assert {path.name for path in tmp_path.iterdir()} == {"test"}
