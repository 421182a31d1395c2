"""Near copies are found in all splits, are dropped only from training, and different images are not reported."""

import io
import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from tarflow_scale import cli
from tarflow_scale.shards import duplicates, packing
from tarflow_scale.shards.duplicates import Copies, Copy, copies_between, find_copies, fingerprint, superfluous
from tarflow_scale.shards.images import encode_image, encode_png
from tarflow_scale.shards.reader import ShardSet


def picture(number: int, size: int = 64) -> Image.Image:
    """An image of smooth colours, which differs from the images of other numbers as much as photographs do."""
    coarse = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
    return Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)


def pixels(image: Image.Image) -> NDArray[np.uint8]:
    return np.asarray(image.convert("RGB")).transpose(2, 0, 1)


def stored_again(image: Image.Image) -> Image.Image:
    return Image.open(io.BytesIO(encode_image(pixels(image), "jpeg", 40)))


ALTERED = {
    "jpeg": stored_again,
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.15),
    "halved": lambda image: image.resize((32, 32)).resize((64, 64)),
    "paler": lambda image: ImageEnhance.Contrast(image).enhance(0.8),
}


def found_among(images: list[NDArray[np.uint8]]) -> Copies:
    texts = [duplicates.text_of([fingerprint(image)]) for image in images]
    return find_copies(duplicates.read_fingerprints(texts), lambda number: images[number])


@pytest.mark.parametrize("how", ALTERED)
def test_a_photograph_that_was_stored_again_is_a_near_copy(how: str) -> None:
    images = [pixels(picture(number)) for number in range(40)]
    copies = found_among([*images, pixels(ALTERED[how](picture(7)))])
    assert copies.near == {7: [40], 40: [7]}
    assert copies.first.tolist() == list(range(41))


def test_no_two_of_many_different_pictures_are_copies() -> None:
    copies = found_among([pixels(picture(number)) for number in range(600)])
    assert copies.are_told_apart
    assert copies.near == {}


def test_equal_hashes_of_different_pictures_are_not_enough() -> None:
    """The pixels decide; this test gives one picture the hash of another."""
    images = [pixels(picture(number)) for number in range(2)]
    forged = np.array([[1, 77], [2, 77]], np.uint64)
    assert find_copies(forged, lambda number: images[number]).near == {}
    assert find_copies(forged, lambda _: images[0]).near == {0: [1], 1: [0]}


def test_blocks_of_hashes_find_every_pair_that_comparing_all_does() -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, 400, np.uint64)
    for number, bits in enumerate([0, 1, 2, 3, 4, 5, 6, 6, 6, 6, 7, 7, 8, 9] * 8):
        flipped = rng.choice(64, bits, replace=False).astype(np.uint64)
        near = hashes[number] ^ np.bitwise_or.reduce(np.uint64(1) << flipped) if bits else hashes[number]
        hashes = np.append(hashes, near)
    pairs = duplicates._alike(hashes)
    assert pairs is not None
    expected = {(a, b) for a, b in combinations(range(len(hashes)), 2) if int(hashes[a] ^ hashes[b]).bit_count() <= 6}
    assert {(a, b) for a, b in pairs.tolist()} == expected
    assert len(expected) == 80


def test_hashes_that_tell_nothing_apart_are_not_reported() -> None:
    near = np.arange(1, 400, dtype=np.uint64) % 16
    copies = find_copies(
        np.stack([np.arange(1, 400, dtype=np.uint64), near + np.uint64(1)], 1), lambda _: pixels(picture(0))
    )
    assert not copies.are_told_apart
    lines = duplicates.described(copies, np.zeros(399, np.int64), ["train"], str, 64)
    assert lines == [
        "copies (near copies are not listed, because there are more than 2 pairs per image; this is usual for drawings "
        "and for frames of films): none"
    ]


COPIES = Copies(
    # images 0, 4 and 9 are equal, and so are 1 and 2; 3 is a near copy of 1, 5 of 6, 6 of 7
    first=np.array([0, 1, 1, 3, 0, 5, 6, 7, 8, 0]),
    near={1: [3], 3: [1], 5: [6], 6: [5, 7], 7: [6]},
    are_told_apart=True,
)


def test_what_is_held_out_stays_and_training_images_like_it_leave() -> None:
    split = np.array([0, 0, 0, 0, 0, 0, 0, 0, 1, 1])
    assert superfluous(COPIES, split) == [
        Copy(0, 9, True), Copy(2, 1, True), Copy(3, 1, False), Copy(4, 9, True), Copy(6, 5, False),
    ]  # fmt: skip
    # 7 is like 6, which leaves, and not like 5, which stays, so that no chain of small changes empties a data set
    assert superfluous(COPIES, np.array([0, 1, 0, 0, 2, 0, 0, 0, 0, 0])) == [
        Copy(0, 4, True), Copy(2, 1, True), Copy(3, 1, False), Copy(6, 5, False), Copy(9, 4, True),
    ]  # fmt: skip
    assert superfluous(COPIES, np.ones(10, np.int64)) == []


def test_copies_are_counted_within_and_across_splits() -> None:
    split = np.array([0, 0, 0, 1, 1, 0, 1, 1, 1, -1])
    assert copies_between(COPIES, split) == {
        (0, 0): [Copy(2, 1, True)],
        (1, 0): [Copy(3, 1, False), Copy(4, 0, True), Copy(6, 5, False)],
        (1, 1): [Copy(7, 6, False)],
    }
    lines = duplicates.described(COPIES, split, ["train", "test"], "image {}".format, 64)
    assert lines[0] == "copies and near copies:"
    assert (
        "  test: 3 of 5 images are like an image in train (1 with equal pixels): image 3 like image 1; "
        "image 4 like image 0; " in lines[2]
    )


def write_photographs(path: Path) -> list[str]:
    """Write 40 training images: one equals a held-out image, two are near copies of held-out images, one has a copy."""
    for split, numbers in (("train", range(40)), ("test", range(100, 110))):
        (path / split / "a").mkdir(parents=True)
        for number in numbers:
            (path / split / f"a/{number:03d}.png").write_bytes(encode_png(pixels(picture(number))))
    for name, image in (("100", picture(0)), ("101", stored_again(picture(1))), ("102", ALTERED["paler"](picture(2)))):
        (path / f"test/a/{name}.png").write_bytes(encode_png(pixels(image)))
    (path / "train/a/039.png").write_bytes(encode_png(pixels(stored_again(picture(5)))))
    return ["prepare", "source.kind=folder", f"source.path={path}", "shards.samples_per_shard=16"]


def test_near_copies_are_reported_by_prepare_and_by_stats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*write_photographs(tmp_path / "images"), f"shards.path={tmp_path}/out"]
    assert cli.main([*arguments, "shards.num_workers=2"]) == 0
    across = (
        "  test: 3 of 10 images are like an image in train (1 with equal pixels): test/a/100.png like train/a/000.png; "
        "test/a/101.png like train/a/001.png; test/a/102.png like train/a/002.png"
    )
    within = (
        "  train: 1 of 40 images are like an earlier image (0 with equal pixels): train/a/039.png like train/a/005.png"
    )
    out = capsys.readouterr().out
    assert f"copies and near copies:\n{within}\n{across}\n" in out
    for split in ("train", "test"):
        assert cli.main(["prepare", "--stats", f"{tmp_path}/out/{split}"]) == 0
        out = capsys.readouterr().out
        assert f"copies and near copies:\n{within}\n{across}\n" in out
    assert cli.main([*arguments, f"shards.path={tmp_path}/kept", "split.near_duplicates=keep"]) == 0
    assert " like " not in capsys.readouterr().out
    for split in ("train", "test"):  # what is reported is part of no data set
        kept, told = (tmp_path / folder / split / "manifest.json" for folder in ("kept", "out"))
        assert kept.read_bytes() == told.read_bytes()


def origins(path: Path) -> list[str]:
    shards = ShardSet(str(path))
    stored = shards.read(np.arange(shards.manifest.num_images))
    return sorted(json.loads(sample.members()["json"])["origin"] for sample in stored)


def test_near_copies_of_held_out_images_are_dropped_from_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "_UNIT", 8)  # several units of the first pass
    arguments = [*write_photographs(tmp_path / "images"), "split.near_duplicates=drop"]
    for workers in (1, 2):
        more = [f"shards.path={tmp_path}/{workers}", f"shards.num_workers={workers}"]
        assert cli.main([*arguments, *more]) == 0
        assert "train: 4 of 40 images are dropped as copies or near copies" in capsys.readouterr().out
    first, second = (
        {
            file.relative_to(tmp_path / name): file.read_bytes()
            for file in (tmp_path / name).rglob("*")
            if file.is_file()
        }
        for name in ("1", "2")
    )
    assert first == second
    assert origins(tmp_path / "1/train") == [f"train/a/{number:03d}.png" for number in range(3, 39)]
    assert len(origins(tmp_path / "1/test")) == 10
    manifests = {split: ShardSet(f"{tmp_path}/1/{split}").manifest for split in ("train", "test")}
    assert (manifests["train"].dropped_copies, manifests["test"].dropped_copies) == (4, 0)
    rows = [json.loads(line) for line in (tmp_path / "1/train/dropped.jsonl").read_text().splitlines()]
    assert rows[0] == {"origin": "train/a/000.png", "like": "test/a/100.png", "is_equal": True}
    assert rows[3] == {"origin": "train/a/039.png", "like": "train/a/005.png", "is_equal": False}
    assert not (tmp_path / "1/test/dropped.jsonl").exists()
    assert cli.main(["prepare", "--check", f"{tmp_path}/1/train"]) == 0
    assert cli.main([*arguments, f"shards.path={tmp_path}/1"]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert cli.main([*arguments[:-1], f"shards.path={tmp_path}/1"]) == 2  # with copies it is another data set


def test_nothing_but_copies_is_no_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "test"):
        (tmp_path / "images" / split / "a").mkdir(parents=True)
        (tmp_path / "images" / split / "a/1.png").write_bytes(encode_png(pixels(picture(0))))
    arguments = ["source.kind=folder", f"source.path={tmp_path}/images", f"shards.path={tmp_path}/out"]
    assert cli.main(["prepare", *arguments, "split.near_duplicates=drop"]) == 2
    assert (
        "must leave a training image (got 1 images, and all are copies or near copies of held-out images)"
        in capsys.readouterr().err
    )
    assert not any(file.is_file() for file in (tmp_path / "out").rglob("*"))


def test_near_copies_of_tiny_images_are_not_looked_for_and_that_is_said(
    digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["prepare", "--stats", f"{digits}/test"]) == 0
    out = capsys.readouterr().out
    assert "copies (the search for near copies needs images of at least 32 pixels): none" in out


def test_equal_images_are_found_at_any_size() -> None:
    images = [np.full((1, 8, 8), value, np.uint8) for value in (1, 2, 1, 3, 2)]
    assert found_among(images).first.tolist() == [0, 1, 0, 3, 1]
    assert found_among([images[0], images[0].reshape(1, 4, 16)]).first.tolist() == [0, 1]


def test_plain_images_are_copies_only_of_their_own_level() -> None:
    images = [np.full((3, 32, 32), value, np.uint8) for value in (10, 200, 11)]
    assert found_among(images).near == {0: [2], 2: [0]}
