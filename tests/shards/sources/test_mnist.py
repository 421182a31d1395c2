"""MNIST's formats: npz and IDX, plain and gzipped; and the messages for damaged files."""

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tarflow_scale.config.prepare import PrepareConfig, SourceConfig, SplitConfig
from tarflow_scale.errors import DataError
from tarflow_scale.shards.reader import ShardSet
from tarflow_scale.shards.sources import ImageSource, open_source
from tarflow_scale.shards.sources.mnist import MnistSource
from tarflow_scale.verbs.prepare.driver import run as prepare

RNG = np.random.default_rng(0)
ARRAYS = {
    "train_x": RNG.integers(0, 256, (30, 6, 6), np.uint8),
    "train_y": (np.arange(30) % 3).astype(np.uint8),
    "test_x": RNG.integers(0, 256, (10, 6, 6), np.uint8),
    "test_y": (np.arange(10) % 3).astype(np.uint8),
}
IDX = {
    "train-images-idx3-ubyte": "train_x",
    "train-labels-idx1-ubyte": "train_y",
    "t10k-images-idx3-ubyte": "test_x",
    "t10k-labels-idx1-ubyte": "test_y",
}


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_npz(path: Path) -> str:
    np.savez(path / "small.npz", **ARRAYS)
    return str(path / "small.npz")


def write_keras_npz(path: Path) -> str:
    np.savez_compressed(path / "small.npz", **{"_".join(reversed(k.split("_"))): v for k, v in ARRAYS.items()})
    return str(path / "small.npz")


def write_idx(path: Path) -> str:
    for name, key in IDX.items():
        (path / name).write_bytes(idx_bytes(ARRAYS[key]))
    return str(path)


def write_idx_gz(path: Path) -> str:
    for name, key in IDX.items():
        (path / f"{name}.gz").write_bytes(gzip.compress(idx_bytes(ARRAYS[key])))
    return str(path)


def write_dotted_idx(path: Path) -> str:
    """Some mirrors use such file names."""
    for name, key in IDX.items():
        (path / name.replace("-idx", ".idx")).write_bytes(idx_bytes(ARRAYS[key]))
    return str(path)


WRITERS = [write_npz, write_keras_npz, write_idx, write_idx_gz, write_dotted_idx]


def images(source: ImageSource) -> np.ndarray:
    return np.stack([source.image(i) for i in range(len(source))])


def test_a_file_of_nearly_the_right_name_is_named(tmp_path: Path) -> None:
    for name, key in IDX.items():
        (tmp_path / f"emnist-letters-{name}").write_bytes(idx_bytes(ARRAYS[key]))
    with pytest.raises(DataError, match=r"there is emnist-letters-train-images-idx3-ubyte; rename it"):
        open_source(SourceConfig(kind="mnist", path=str(tmp_path)))


@pytest.mark.parametrize("write", WRITERS)
def test_every_form_gives_the_same_images_and_the_official_split(write: Callable, tmp_path: Path) -> None:
    source = open_source(SourceConfig(kind="mnist", path=write(tmp_path)))
    assert (images(source)[:, 0] == np.concatenate([ARRAYS["train_x"], ARRAYS["test_x"]])).all()
    assert source.labels.tolist() == [*(i % 3 for i in range(30)), *(i % 3 for i in range(10))]
    assert source.official is not None
    assert np.flatnonzero(source.official == 2).tolist() == list(range(30, 40))
    assert (source.origin(29), source.origin(30)) == ("train/29", "test/0")
    assert source.class_names == ("0", "1", "2")
    assert source.bit_depth == 8


@pytest.mark.parametrize(("kind", "num_test"), [("auto", 10), ("official", 10), ("stratified", 19)])
def test_the_official_split_is_kept_unless_told_otherwise(tmp_path: Path, kind: str, num_test: int) -> None:
    config = PrepareConfig.model_validate(
        {
            "source": {"kind": "mnist", "path": write_npz(tmp_path)},
            "split": {"kind": kind, "test_fraction": 0.5},
            "shards": {"path": str(tmp_path / "packed"), "samples_per_shard": 8},
        }
    )
    prepare(config, dry_run=False)
    test = ShardSet(str(tmp_path / "packed/test"))
    assert test.manifest.num_images == num_test
    if num_test == 10:
        stored = {image.tobytes() for image in test.take(np.arange(10)).events}
        assert stored == {image.tobytes() for image in ARRAYS["test_x"]}


def test_digits_have_no_official_split(tmp_path: Path) -> None:
    config = PrepareConfig.model_validate(
        {"source": {"kind": "digits"}, "split": SplitConfig(kind="official"), "shards": {"path": str(tmp_path / "x")}}
    )
    with pytest.raises(
        DataError, match=r"digits has no official split \(got split.kind=official\); set split.kind=stratified"
    ):
        prepare(config, dry_run=False)
    assert not (tmp_path / "x").exists()


def truncated(path: Path) -> str:
    folder = write_idx(path)
    file = path / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-1])
    return folder


def short_header(path: Path) -> str:
    folder = write_idx(path)
    (path / "train-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x03\0\0")
    return folder


def not_idx(path: Path) -> str:
    folder = write_idx(path)
    (path / "t10k-labels-idx1-ubyte").write_bytes(b"<html>")
    return folder


def broken_gzip(path: Path) -> str:
    folder = write_idx_gz(path)
    file = path / "train-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-20])
    return folder


def bomb(path: Path) -> str:
    folder = write_idx_gz(path)
    with gzip.open(path / "train-images-idx3-ubyte.gz", "wb") as file:
        file.write(bytes(20_000))
    return folder


def missing(path: Path) -> str:
    folder = write_idx(path)
    (path / "t10k-images-idx3-ubyte").unlink()
    return folder


def absent(path: Path) -> str:
    return str(path / "absent.npz")


def not_npz(path: Path) -> str:
    (path / "a.npz").write_bytes(b"PK no archive")
    return str(path / "a.npz")


def pickled(path: Path) -> str:
    np.savez(path / "a.npz", **(ARRAYS | {"train_x": np.array([{"run": "me"}], dtype=object)}))
    return str(path / "a.npz")


def single_array(path: Path) -> str:
    with (path / "a.npz").open("wb") as file:
        np.save(file, ARRAYS["train_x"])
    return str(path / "a.npz")


def other_names(path: Path) -> str:
    np.savez(path / "a.npz", images=ARRAYS["train_x"])
    return str(path / "a.npz")


def fewer_labels(path: Path) -> str:
    np.savez(path / "a.npz", **(ARRAYS | {"test_y": ARRAYS["test_y"][:-1]}))
    return str(path / "a.npz")


def floats(path: Path) -> str:
    np.savez(path / "a.npz", **(ARRAYS | {"train_x": ARRAYS["train_x"].astype(np.float32)}))
    return str(path / "a.npz")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (truncated, r"train-images-idx3-ubyte must hold 1080 values \(got 1079 for the shape \(30, 6, 6\)\)"),
        (short_header, r"train-labels-idx1-ubyte ends inside its header \(got 6 bytes\)"),
        (not_idx, r"t10k-labels-idx1-ubyte is not an IDX file of unsigned bytes \(starts with b'<htm'\)"),
        (broken_gzip, r"train-images-idx3-ubyte.gz cannot be unpacked"),
        (bomb, r"train-images-idx3-ubyte.gz holds more than 10,000 bytes"),
        (missing, r"no t10k-images-idx3-ubyte or t10k-images-idx3-ubyte.gz in"),
        (absent, r"there is no .*absent.npz; check source.path"),
        (not_npz, r"a.npz is not an .npz file of plain arrays"),
        (pickled, r"a.npz is not an .npz file of plain arrays \(Object arrays cannot be loaded"),
        (single_array, r"a.npz is not an .npz file of plain arrays"),
        (other_names, r"must hold train_x or x_train \(got images\)"),
        (fewer_labels, r"a whole number of at least 0 \(got labels \(9,\) uint8 in test"),
        (floats, r"images must be an array \(n, H, W\) of uint8 \(got \(30, 6, 6\) float32 in train"),
    ],
)
def test_damage_is_named(make: Callable, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tarflow_scale.shards.sources.mnist._MAX_FILE_BYTES", 10_000)
    with pytest.raises(DataError, match=message):
        open_source(SourceConfig(kind="mnist", path=make(tmp_path)))


def test_images_need_not_be_square(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "a.npz", **{name: array[:, :, :4] if array.ndim == 3 else array for name, array in ARRAYS.items()}
    )
    source = open_source(SourceConfig(kind="mnist", path=str(tmp_path / "a.npz")))
    assert source.shape == (1, 6, 4)
    assert np.array_equal(source.image(0)[0], ARRAYS["train_x"][0, :, :4])


def test_arrays_that_are_neither_train_nor_test_are_reported(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **ARRAYS, val_x=ARRAYS["test_x"], val_y=ARRAYS["test_y"])
    assert MnistSource(str(tmp_path / "a.npz")).lines == (
        "left out: arrays val_x, val_y, which belong to neither split",
    )
