"""``prepare``: splits are stratified, bytes are reproducible, and a data set is complete or absent."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from tarflow_scale import cli
from tarflow_scale.config.prepare import SourceConfig
from tarflow_scale.randomness import Purpose, permutation
from tarflow_scale.runtime.processes import exclusive
from tarflow_scale.shards import packing, workers
from tarflow_scale.shards.images import decode_image, encode_png
from tarflow_scale.shards.reader import ShardSet
from tarflow_scale.shards.sources import open_source
from tarflow_scale.verbs.prepare.split import stratified
from tests.conftest import SAMPLES, TOP
from tests.forking import HANG_SECONDS
from tests.shards.sources.test_archives import write_cifar10


def pack(path: Path, *more: str) -> int:
    return cli.main(["prepare", "source.kind=digits", f"shards.path={path}", "shards.samples_per_shard=200", *more])


def test_the_splits_are_stratified_disjoint_and_complete(digits: Path) -> None:
    splits = {name: ShardSet(f"{digits}/{name}") for name in ("train", "test")}
    batches = {name: shards.take(np.arange(shards.manifest.num_images)) for name, shards in splits.items()}
    counts = {name: np.bincount(batch.labels) for name, batch in batches.items()}
    assert (counts["train"] + counts["test"]).sum() == 1797
    share = counts["test"] / (counts["train"] + counts["test"])
    assert abs(share - 0.2).max() < 0.004
    stored = [
        sample
        for shards in splits.values()
        for number, shard in enumerate(shards.manifest.shards)
        for sample in shards.read_run(number, 0, shard.samples)
    ]
    origins = {json.loads(sample.members()["json"])["origin"] for sample in stored}
    assert len(origins) == 1797


@pytest.mark.parametrize(("classes", "fraction"), [(1, 0.2), (3, 0.5), (700, 0.1), (2_000, 0.3)])
def test_one_sort_splits_as_a_scan_for_each_class_did(classes: int, fraction: float) -> None:
    labels = np.random.default_rng(classes).integers(0, classes, 5_000) * 3  # some labels without images
    expected = np.zeros(len(labels), dtype=np.bool_)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        chosen = permutation(len(members), Purpose.SPLIT, 7, int(label))[: round(len(members) * fraction)]
        expected[members[chosen]] = True
    assert np.array_equal(stratified(labels, fraction, 7), expected)


def test_packing_mixes_the_classes(digits: Path) -> None:
    shards = ShardSet(f"{digits}/train")
    first = np.bincount(shards.take(np.arange(200)).labels, minlength=10)
    assert first.min() > 5


def test_packing_is_reproducible_and_repeating_it_does_nothing(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pack(tmp_path / "a") == 0
    for file in sorted((digits / "train").iterdir()):
        assert (tmp_path / "a/train" / file.name).read_bytes() == file.read_bytes()
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "a").rglob("*") if file.is_file()}
    capsys.readouterr()
    assert pack(tmp_path / "a") == 0
    assert "nothing to do" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in times} == times


def test_another_data_set_in_the_same_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pack(tmp_path) == 0
    for dry in ((), ("--dry-run",)):
        capsys.readouterr()
        assert pack(tmp_path, "split.seed=1", *dry) == 2
        assert capsys.readouterr().err == (
            f"tarflow-scale: error: {tmp_path}/train holds another data set; choose another shards.path, or delete "
            f"that data set\n"
        )


def test_an_interrupted_packing_is_no_data_set_and_can_be_repeated(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train/.packing").write_bytes(b"begun")
    (tmp_path / "train/train-00000.tar").write_bytes(b"half")
    (tmp_path / "train/.0123.partial").write_bytes(b"half")
    assert pack(tmp_path) == 0
    assert {file.name for file in (digits / "train").iterdir()} == {
        file.name for file in (tmp_path / "train").iterdir()
    }
    assert (tmp_path / "train/manifest.json").read_bytes() == (digits / "train/manifest.json").read_bytes()


def test_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pack(tmp_path / "x", "--dry-run") == 0
    assert not (tmp_path / "x").exists()
    said = capsys.readouterr().out
    assert "1x8x8 images, 4 bit" in said
    assert "20% of each class is held out at random: split.test_fraction=0.2\n" in said


def test_a_folder_of_images(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(10):
            image = rng.integers(0, 256, (3, 20 + i, 30), np.uint8)
            (tmp_path / "images" / name / f"{i}.png").write_bytes(encode_png(image))
    arguments = ["source.kind=folder", f"source.path={tmp_path}/images", "source.resize=center_crop"]
    code = cli.main(["prepare", *arguments, "source.size_pixels=16", f"shards.path={tmp_path}/packed"])
    assert code == 0
    train, test = ShardSet(f"{tmp_path}/packed/train"), ShardSet(f"{tmp_path}/packed/test")
    assert (train.manifest.num_images, test.manifest.num_images) == (16, 4)
    assert train.manifest.class_names == ("cat", "dog")
    assert train.take(np.arange(3)).events.shape == (3, 3, 16, 16)


@pytest.mark.parametrize("broken", range(0, 40, 7))
def test_a_failure_half_way_leaves_nothing_and_mending_it_mixes_no_splits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], broken: int
) -> None:
    """The failed packing must leave no split, because the fixed source is divided in another way."""
    (tmp_path / "images/a").mkdir(parents=True)
    for i in range(40):
        content = b"no image" if i == broken else encode_png(np.full((1, 8, 8), i, np.uint8))
        (tmp_path / f"images/a/{i:02d}.png").write_bytes(content)
    arguments = ["prepare", "source.kind=folder", f"source.path={tmp_path}/images", f"shards.path={tmp_path}/out"]
    assert cli.main([*arguments, "shards.samples_per_shard=8"]) == 2
    assert f"{broken:02d}.png cannot be decoded" in capsys.readouterr().err.splitlines()[-1]
    assert not any(path.is_file() for path in (tmp_path / "out").rglob("*"))
    (tmp_path / f"images/a/{broken:02d}.png").unlink()
    assert cli.main([*arguments, "shards.samples_per_shard=8"]) == 0
    splits = [ShardSet(f"{tmp_path}/out/{name}") for name in ("train", "test")]
    values = [shards.take(np.arange(shards.manifest.num_images)).events[:, 0, 0, 0].tolist() for shards in splits]
    assert sorted(values[0] + values[1]) == [i for i in range(40) if i != broken]


def test_images_that_were_added_later_are_another_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "images/a").mkdir(parents=True)
    arguments = ["prepare", "source.kind=folder", f"source.path={tmp_path}/images", f"shards.path={tmp_path}/out"]
    for i in range(10):
        (tmp_path / f"images/a/{i}.png").write_bytes(encode_png(np.full((1, 8, 8), i, np.uint8)))
    assert cli.main(arguments) == 0
    (tmp_path / "images/a/new.png").write_bytes(encode_png(np.full((1, 8, 8), 99, np.uint8)))
    capsys.readouterr()
    assert cli.main(arguments) == 2
    assert "holds another data set" in capsys.readouterr().err


def write_classes(path: Path, num: int = 40, size: int = 8) -> list[str]:
    """A folder of two classes, and the arguments that pack it into small shards."""
    rng = np.random.default_rng(0)
    for i in range(num):
        (path / "images" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        image = rng.integers(0, 256, (3, size, size), np.uint8)
        (path / f"images/{'ab'[i % 2]}/{i:03d}.png").write_bytes(encode_png(image))
    return ["prepare", "source.kind=folder", f"source.path={path}/images", "shards.samples_per_shard=4"]


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def test_workers_do_not_change_the_bytes(tmp_path: Path) -> None:
    arguments = write_classes(tmp_path)
    assert cli.main([*arguments, f"shards.path={tmp_path}/one"]) == 0
    assert cli.main([*arguments, f"shards.path={tmp_path}/two", "shards.num_workers=2"]) == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(contents(tmp_path / "one")) == 2 * 10 + 2


def test_a_killed_packing_goes_on_and_ends_in_the_same_bytes(tmp_path: Path) -> None:
    arguments = write_classes(tmp_path, num=600, size=48)
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "tarflow_scale", *arguments, f"shards.path={out}"]
    process = subprocess.Popen(command, cwd=TOP, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(list(out.glob("train/*.tar"))) < 10:
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not list(out.rglob("manifest.json"))
    kept = {file: file.stat().st_mtime_ns for file in out.glob("train/.*.packed.json")}
    assert len(kept) >= 9
    broken = sorted(out.glob("train/*.tar"))[2]
    broken.write_bytes(broken.read_bytes()[:-7])
    times = {tar: tar.stat().st_mtime_ns for tar in sorted(out.glob("train/*.tar"))[:8]}
    assert cli.main([*arguments, f"shards.path={out}"]) == 0
    assert [tar.stat().st_mtime_ns == times[tar] for tar in times] == [tar != broken for tar in times]
    assert cli.main([*arguments, f"shards.path={tmp_path}/whole"]) == 0
    assert contents(out) == contents(tmp_path / "whole")


def test_a_packing_process_that_dies_costs_only_its_shard(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*write_classes(tmp_path), f"shards.path={tmp_path}/out", "shards.num_workers=2"]
    monkeypatch.setattr("tarflow_scale.shards.workers._apply", die_at_the_fourth)
    assert cli.main(arguments) == 2
    assert "a worker process died" in capsys.readouterr().err
    assert len(list((tmp_path / "out/train").glob(".*.packed.json"))) >= 3
    monkeypatch.undo()
    assert cli.main(arguments) == 0
    assert "continuing" in capsys.readouterr().out
    assert cli.main([*arguments[:-2], f"shards.path={tmp_path}/whole"]) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def die_at_the_fourth(number: int) -> packing.PackNote:
    """In a worker process, pack the first three shards; then kill the process."""
    plan = getattr(workers._function_of_worker[0], "__self__", None)
    assert isinstance(plan, packing.Packing)
    if number < 3:
        return plan.pack(number)
    while len(list(Path(plan.path).glob(".*.packed.json"))) < 3:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def test_what_another_plan_left_half_done_is_not_mixed_in(tmp_path: Path) -> None:
    arguments = write_classes(tmp_path)
    assert cli.main([*arguments, f"shards.path={tmp_path}/out"]) == 0
    assert cli.main([*arguments, f"shards.path={tmp_path}/whole", "split.seed=1"]) == 0
    for split in ("train", "test"):
        (tmp_path / f"out/{split}/manifest.json").unlink()
        (tmp_path / f"out/{split}/.packing").write_bytes(b"begun")
    (tmp_path / "out/train/train-00099.tar").write_bytes(b"of a longer plan")
    assert cli.main([*arguments, f"shards.path={tmp_path}/out", "split.seed=1"]) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("workers", [1, 2])
def test_unusable_images_are_an_error_or_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    arguments = [*write_classes(tmp_path), f"shards.path={tmp_path}/out", f"shards.num_workers={workers}"]
    bad = {"images/a/010.png": b"", "images/b/011.png": encode_png(np.zeros((3, 8, 9), np.uint8))}
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    assert cli.main(arguments) == 2
    assert not contents(tmp_path / "out")
    capsys.readouterr()
    assert cli.main([*arguments, "source.bad_images=skip"]) == 0
    assert "unusable images left out" in capsys.readouterr().out
    splits = [ShardSet(f"{tmp_path}/out/{name}") for name in ("train", "test")]
    assert sum(shards.manifest.num_images for shards in splits) == 38
    listed = [
        json.loads(line)["origin"]
        for file in (tmp_path / "out").rglob("skipped.jsonl")
        for line in file.read_text().splitlines()
    ]
    assert sorted(listed) == ["a/010.png", "b/011.png"]
    assert cli.main(["prepare", "--check", f"{tmp_path}/out/train"]) == 0


@pytest.mark.parametrize("codec", ["png", "webp", "raw", "jpeg"])
def test_codecs(tmp_path: Path, codec: str) -> None:
    arguments = write_classes(tmp_path)
    assert cli.main([*arguments, f"shards.path={tmp_path}/png"]) == 0
    assert cli.main([*arguments, f"shards.path={tmp_path}/it", f"shards.codec={codec}"]) == 0
    it, png = ShardSet(f"{tmp_path}/it/train"), ShardSet(f"{tmp_path}/png/train")
    assert it.manifest.codec == ("jpeg, quality 95" if codec == "jpeg" else codec)
    a, b = (shards.take(np.arange(shards.manifest.num_images)).events.astype(int) for shards in (it, png))
    assert abs(a - b).max() <= (60 if codec == "jpeg" else 0)


def test_many_unusable_images_are_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*write_classes(tmp_path), f"shards.path={tmp_path}/out", "source.bad_images=skip"]
    for number in range(0, 40, 4):
        (tmp_path / f"images/a/{number:03d}.png").write_bytes(b"no image")
    assert cli.main(arguments) == 2
    assert "(got 10 of 40, allowed: source.max_bad_fraction=0.1); the first reason is: " in capsys.readouterr().err
    assert not contents(tmp_path / "out")
    assert cli.main([*arguments, "source.max_bad_fraction=0.25"]) == 0


def test_files_of_somebody_else_are_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their names may be like ours: WebDataset's own examples write train-00000.tar."""
    (tmp_path / "out/train").mkdir(parents=True)
    for name in ("train-00000.tar", "train-00007.tar", "skipped.jsonl"):
        (tmp_path / "out/train" / name).write_bytes(b"precious")
    before = contents(tmp_path / "out")
    arguments = [*write_classes(tmp_path), f"shards.path={tmp_path}/out"]
    assert cli.main(arguments) == 2
    assert "out/train holds other files (got skipped.jsonl); choose another shards.path" in capsys.readouterr().err
    assert contents(tmp_path / "out") == before


def test_a_source_is_not_packed_over_itself(tmp_path: Path) -> None:
    arguments = write_classes(tmp_path)
    assert cli.main([*arguments, f"shards.path={tmp_path}/tars", "split.test_fraction=0"]) == 0
    for name in ("manifest.json", *(file.name for file in (tmp_path / "tars/train").glob("*.npz"))):
        (tmp_path / "tars/train" / name).unlink()
    before = contents(tmp_path / "tars")
    source = ["source.kind=webdataset", f"source.path={tmp_path}/tars/train", "split.test_fraction=0"]
    assert cli.main(["prepare", *source, f"shards.path={tmp_path}/tars"]) == 2
    assert contents(tmp_path / "tars") == before


def test_a_second_prepare_into_the_same_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*write_classes(tmp_path), f"shards.path={tmp_path}/out"]
    with exclusive(tmp_path / "out"):
        assert cli.main([*arguments, "shards.codec=webp"]) == 2
    assert f"{tmp_path}/out must have one writer at a time (in use by process " in capsys.readouterr().err
    assert cli.main(arguments) == 0


@pytest.mark.parametrize("spelling", ["~", "file"])
def test_the_lock_is_where_the_shards_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], spelling: str
) -> None:
    arguments = write_classes(tmp_path)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path))
    path = "~/out" if spelling == "~" else f"file://{tmp_path}/out"
    with exclusive(tmp_path / "out"):
        assert cli.main([*arguments, f"shards.path={path}"]) == 2
    assert "must have one writer at a time" in capsys.readouterr().err
    assert cli.main([*arguments, f"shards.path={path}"]) == 0
    assert ShardSet(f"{tmp_path}/out/train").manifest.num_images
    assert list((tmp_path / "work").iterdir()) == []


def test_a_killed_prepare_leaves_no_process_and_no_temporary_file(tmp_path: Path) -> None:
    """No worker may continue to write, and the temporary copy of the images of a table must be deleted."""
    some = np.random.default_rng(0).integers(0, 256, (60, 3, 64, 64), np.uint8)
    rows = [{"image": {"bytes": encode_png(image)}, "label": 0} for image in some] * 20
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "scratch").mkdir()
    arguments = ["prepare", "source.kind=parquet", f"source.path={tmp_path}/a.parquet", f"shards.path={tmp_path}/out"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tarflow_scale", *arguments, "shards.num_workers=2", "shards.samples_per_shard=4"],
        cwd=TOP,
        env=os.environ | {"TMPDIR": str(tmp_path / "scratch")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while len(list((tmp_path / "out").glob("train/*.tar"))) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) >= 2
    process.kill()
    process.wait()
    deadline = time.monotonic() + HANG_SECONDS
    while any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert not any(file.stat().st_size for file in (tmp_path / "scratch").rglob("*") if file.is_file())
    assert cli.main([*arguments, "shards.samples_per_shard=4"]) == 0
    assert cli.main(["prepare", "--check", f"{tmp_path}/out/train"]) == 0


def test_a_source_that_was_written_again_is_not_mixed_with_what_is_packed(tmp_path: Path) -> None:
    arguments = write_classes(tmp_path)
    assert cli.main([*arguments, f"shards.path={tmp_path}/out"]) == 0
    for file in (tmp_path / "images").rglob("*.png"):
        status = file.stat()
        file.write_bytes(bytes(reversed(file.read_bytes()))[::-1])
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    source = open_source(SourceConfig(kind="folder", path=f"{tmp_path}/images"))
    (tmp_path / "images/a/000.png").touch()
    assert open_source(SourceConfig(kind="folder", path=f"{tmp_path}/images")).version != source.version
    assert open_source(SourceConfig(kind="folder", path=f"{tmp_path}/images")).digest == source.digest


def test_nothing_left_for_training_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*write_classes(tmp_path, num=2), f"shards.path={tmp_path}/out", "split.test_fraction=0.9"]
    assert cli.main(arguments) == 2
    said = "no image is left for training (got 2 images and split.test_fraction=0.9); lower split.test_fraction"
    assert said in capsys.readouterr().err


def test_a_test_split_that_is_empty_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tree(tmp_path / "in", "a/0.png", "a/1.png", "b/0.png")
    assert prepare_folder(tmp_path / "in", tmp_path / "out") == 0
    assert (
        "warning: no test split: split.test_fraction=0.2 of each class is less than one image"
        in capsys.readouterr().out
    )
    assert prepare_folder(tmp_path / "in", tmp_path / "other", "split.test_fraction=0") == 0
    assert "no test split" not in capsys.readouterr().out


def test_cifar_binaries_from_the_command_line(tmp_path: Path) -> None:
    rows, labels = write_cifar10(tmp_path / "cifar", binary=True)
    arguments = ["prepare", "source.kind=cifar", f"source.path={tmp_path}/cifar", f"shards.path={tmp_path}/out"]
    assert cli.main(arguments) == 0
    train, test = ShardSet(f"{tmp_path}/out/train"), ShardSet(f"{tmp_path}/out/test")
    assert (train.manifest.num_images, test.manifest.num_images) == (20, 4)
    for shards in (train, test):
        batch = shards.take(np.arange(shards.manifest.num_images))
        for image, label in zip(batch.events, batch.labels, strict=True):
            (number,) = np.flatnonzero((rows == image.reshape(-1)).all(axis=1))
            assert labels[number] == label


needs_samples = pytest.mark.skipif(not SAMPLES.exists(), reason="needs real images beside the checkout (shared/data)")


@needs_samples
def test_kodak_photos_become_256_pixel_crops(tmp_path: Path) -> None:
    with tarfile.open(SAMPLES / "kodak24_png.tar") as tar:
        tar.extractall(tmp_path / "kodak", filter="data")
    (folder,) = {file.parent for file in (tmp_path / "kodak").rglob("*.png")}
    arguments = [f"source.path={folder}", "source.resize=center_crop", "source.size_pixels=256"]
    assert cli.main(["prepare", "source.kind=folder", *arguments, f"shards.path={tmp_path}/out"]) == 0
    splits = [ShardSet(f"{tmp_path}/out/{name}") for name in ("train", "test")]
    assert sum(shards.manifest.num_images for shards in splits) == 24
    assert splits[0].manifest.event.shape == (3, 256, 256)
    assert "lanczos" in splits[0].manifest.source
    for name in ("train", "test"):
        assert cli.main(["prepare", "--check", f"{tmp_path}/out/{name}"]) == 0
    (stored,) = splits[1].read(np.array([0]))
    photo = Image.open(folder / json.loads(stored.members()["json"])["origin"]).convert("RGB")
    width, height = photo.size
    resized = photo.resize((round(width * 256 / min(photo.size)), round(height * 256 / min(photo.size))), 1)
    left, top = (resized.width - 256) // 2, (resized.height - 256) // 2
    expected = np.asarray(resized)[top : top + 256, left : left + 256]
    assert np.array_equal(splits[1].decode(stored)[0].transpose(1, 2, 0), expected)


@needs_samples
def test_mnist_from_idx_and_from_npz_is_the_same_data_set(tmp_path: Path) -> None:
    """The first 3,000 and 500 images of the real files."""
    (tmp_path / "idx/mnist").mkdir(parents=True)
    kept: dict[str, np.ndarray] = {}
    with np.load(SAMPLES / "mnist.npz") as arrays:
        for split, name, num in (("train", "train", 3000), ("test", "t10k", 500)):
            for part, kind, axes in (("x", "images", 3), ("y", "labels", 1)):
                key = next(key for key in (f"{split}_{part}", f"{part}_{split}") if key in arrays.files)
                array = kept[key] = arrays[key][:num].astype(np.uint8)
                header = bytes([0, 0, 8, axes]) + np.array(array.shape, ">u4").tobytes()
                (tmp_path / f"idx/mnist/{name}-{kind}-idx{axes}-ubyte").write_bytes(header + array.tobytes())
    np.savez(tmp_path / "mnist.npz", **kept)
    for source, out in (("mnist.npz", "npz"), ("idx/mnist", "idx")):
        path = [f"source.path={tmp_path}/{source}", f"shards.path={tmp_path}/out/{out}"]
        assert cli.main(["prepare", "source.kind=mnist", *path]) == 0
    npz, idx = contents(tmp_path / "out/npz"), contents(tmp_path / "out/idx")
    assert npz.keys() == idx.keys()
    assert [name for name in npz if npz[name] != idx[name]] == []
    assert ShardSet(f"{tmp_path}/out/idx/train").manifest.num_images == 3_000


def test_check_finds_every_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = write_classes(tmp_path)
    assert cli.main([*arguments, f"shards.path={tmp_path}/out"]) == 0
    path = tmp_path / "out/train"
    assert cli.main(["prepare", "--check", str(path)]) == 0
    assert f"{path}: all 32 samples are intact" in capsys.readouterr().out
    for file in [*sorted(path.glob("*.tar"))[:2], *sorted(path.glob("*.npz"))[:2]]:
        whole = file.read_bytes()
        damaged = bytearray(whole)
        damaged[len(whole) // 2] ^= 1
        file.write_bytes(bytes(damaged))
        assert cli.main(["prepare", "--check", str(path)]) == 2
        assert file.name in capsys.readouterr().err
        file.write_bytes(whole)
    healthy = {file: file.read_bytes() for file in sorted(path.glob("*.tar"))[:3]}
    for file, whole in healthy.items():
        file.write_bytes(whole[:600] + bytes([whole[600] ^ 1]) + whole[601:])
    assert cli.main(["prepare", "--check", str(path)]) == 2
    assert f"{path} has 6 faults, the first: " in capsys.readouterr().err  # a sha256 and a sample each
    for file, whole in healthy.items():
        file.write_bytes(whole)
    assert cli.main(["prepare", "--check", str(path)]) == 0


def test_files_that_are_passed_over_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = write_classes(tmp_path)
    for name in ("notes.txt", "a/scan.PSD", "b/scan.psd", ".DS_Store"):
        (tmp_path / "images" / name).write_bytes(b"no image")
    assert cli.main([*arguments, f"shards.path={tmp_path}/out", "--dry-run"]) == 0
    assert "files that are not packed: 2 *.psd, 1 *.txt, 1 .DS_Store" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_class_folders_without_an_image_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    write_tree(tmp_path, *(f"in/{c}/{i}.png" for c in "ab" for i in range(5)))
    for name in ("bird", "fish/raw"):
        (tmp_path / "in" / name).mkdir(parents=True)
    path = tmp_path / "in"
    if kind == "zip":
        path = Path(shutil.make_archive(str(path), "zip", path))
    assert cli.main(["prepare", f"source.kind={kind}", f"source.path={path}", f"shards.path={tmp_path}/out"]) == 0
    assert "warning: 2 class folders without an image: bird, fish\n" in capsys.readouterr().out


def write_tree(path: Path, *names: str) -> None:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(encode_png(np.full((3, 4, 4), len(name), np.uint8)))


def prepare_folder(path: Path, out: Path, *more: str) -> int:
    return cli.main(["prepare", "source.kind=folder", f"source.path={path}", f"shards.path={out}", *more])


def test_the_plan_says_which_folder_is_which_split_and_what_the_classes_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"in/Training/{c}/{i}.png" for c in ("cat", "dog") for i in range(3)]
    write_tree(tmp_path, *names, "in/valid/cat/0.png", "in/valid/Dog/0.png", "in/test/0.png")
    assert prepare_folder(tmp_path / "in", tmp_path / "out", "--dry-run") == 0
    said = capsys.readouterr().out
    for line in (
        "Training: packed as train (train split, 6 images)",
        "valid: packed as test (validation split, 2 images)",
        "left out: test (test split, 1 image), which has no labels; pack it as a separate source to use it",
        "classes: Dog 1, cat 4, dog 3",
        "warning: classes 'Dog' and 'dog' differ only by case or Unicode form; rename one if they are the same class",
        "warning: 1 of 3 classes are in train and not in test: dog",
        "warning: 1 of 3 classes are in test and not in train: Dog",
    ):
        assert line in said.splitlines()
    assert not (tmp_path / "out").exists()


def test_classes_whose_names_differ_by_unicode_form_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    composed, decomposed = "\u00e9clair", "e\u0301clair"
    write_tree(tmp_path, f"in/{composed}/0.png", f"in/{decomposed}/0.png")
    assert prepare_folder(tmp_path / "in", tmp_path / "out", "--dry-run") == 0
    assert "differ only by case or Unicode form" in capsys.readouterr().out


def test_classes_without_images_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """This happens if labels start at 1."""
    write_tree(tmp_path, "in/0.png", "in/1.png")
    (tmp_path / "in/labels.csv").write_text("0.png,1\n1.png,3\n")
    assert prepare_folder(tmp_path / "in", tmp_path / "out", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "classes: 0 0, 1 1, 2 0, 3 1" in said
    assert "warning: 2 of 4 classes have no image: 0, 2" in said


def test_of_many_classes_the_plan_shows_the_first_and_last(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tree(tmp_path, *(f"in/c{number:02d}/{i}.png" for number in range(20) for i in range(2)))
    assert prepare_folder(tmp_path / "in", tmp_path / "out", "--dry-run") == 0
    assert "classes: c00 2, c01 2, c02 2, c03 2, c04 2, .., c18 2, c19 2" in capsys.readouterr().out.splitlines()
    assert prepare_folder(tmp_path / "in", tmp_path / "out", "split.test_fraction=0") == 0
    capsys.readouterr()
    assert cli.main(["prepare", "--stats", f"{tmp_path}/out/train"]) == 0
    assert "20, with 2 samples each\n" in capsys.readouterr().out


def test_three_splits_are_packed_where_patterns_name_them(tmp_path: Path) -> None:
    write_tree(tmp_path, *(f"in/{s}/{c}/{i}.png" for s in ("a", "b", "c") for c in "xy" for i in range(2)))
    more = ("split.train=[a]", "split.validation=[b]", "split.test=[c]")
    assert prepare_folder(tmp_path / "in", tmp_path / "out", *more) == 0
    for folder, split in (("a", "train"), ("b", "validation"), ("c", "test")):
        shards = ShardSet(f"{tmp_path}/out/{split}")
        assert shards.manifest.split == split
        samples = shards.read_run(0, 0, 4)
        assert {json.loads(s.members()["json"])["origin"][0] for s in samples} == {folder}


def test_a_layout_with_two_readings_is_refused_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tree(tmp_path, *(f"in/{name}/{i}.png" for name in ("train", "bus") for i in range(2)))
    assert prepare_folder(tmp_path / "in", tmp_path / "out") == 2
    assert "set split.by_name=false if they are classes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert prepare_folder(tmp_path / "in", tmp_path / "out", "split.by_name=false", "split.test_fraction=0.5") == 0
    assert ShardSet(f"{tmp_path}/out/train").manifest.class_names == ("bus", "train")


def test_statistics_and_a_contact_sheet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = write_classes(tmp_path)
    assert cli.main([*arguments, f"shards.path={tmp_path}/out"]) == 0
    capsys.readouterr()
    assert cli.main(["prepare", "--stats", f"{tmp_path}/out/train"]) == 0
    out = capsys.readouterr().out
    assert "32 3x8x8 images, 8 bit, png" in out
    assert "0 a (16), 1 b (16)" in out
    sheet = decode_image((tmp_path / "out/train/contact-sheet.png").read_bytes(), "sheet")
    assert sheet.shape == (3, 4 * 9 + 1, 8 * 9 + 1)
    assert cli.main([*arguments, f"shards.path={tmp_path}/out"]) == 0
    assert cli.main(["prepare", "--stats", f"{tmp_path}/out/train", "x=1"]) == 2
