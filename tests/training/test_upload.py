"""Checkpoints in a store: manifest last, failures outlived, others' files awaited."""

import json
import threading
from pathlib import Path

import pytest

from tarflow_scale import storage
from tarflow_scale.config.train import CheckpointConfig
from tarflow_scale.errors import StorageError
from tarflow_scale.training import upload
from tarflow_scale.training.checkpoint import MANIFEST, complete, find_latest, prune
from tarflow_scale.training.upload import Uploader

STATE = {
    "images_seen": 7, "num_steps": 1, "skipped_steps": 0, "skipped_in_a_row": 0, "loss_sum": 0.0, "loss_steps": 0,
    "seconds": 0.0, "run": {},
}  # fmt: skip


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "_FIRST_WAIT_SECONDS", 0.01)


def checkpoint(path: Path, images: int, files: int = 2) -> Path:
    folder = path / f"images-{images:012d}"
    folder.mkdir(parents=True)
    records = {}
    for number in range(files):
        content = f"{images} {number}".encode()
        (folder / f"part-{number}.safetensors").write_bytes(content)
        records[f"part-{number}.safetensors"] = {"sha256": storage.digest(content), "bytes": len(content)}
    (folder / MANIFEST).write_text(json.dumps({"files": records, "state": STATE | {"images_seen": images}}))
    return folder


def config(path: Path, **more: object) -> CheckpointConfig:
    return CheckpointConfig.model_validate({"every_images": 1, "upload_path": str(path), **more})


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_what_arrives_is_whole_and_pruned(tmp_path: Path) -> None:
    uploader = Uploader(config(tmp_path / "store", keep_last=2))
    for images in (10, 20, 30):
        folder = checkpoint(tmp_path / "own", images)
        uploader.start(str(folder), ["part-0.safetensors", "part-1.safetensors"])
    uploader.wait()
    assert names(tmp_path / "store") == ["images-000000000020", "images-000000000030"]
    found = find_latest(str(tmp_path / "own"), str(tmp_path / "store"))
    assert found is not None
    assert found[0] == str(tmp_path / "own/images-000000000030")  # equally new: the nearer one
    (tmp_path / "own/images-000000000030" / MANIFEST).unlink()
    found = find_latest(str(tmp_path / "own"), str(tmp_path / "store"))
    assert found is not None
    assert found[0] == str(tmp_path / "store/images-000000000030")
    assert found[1].images_seen == 30


def test_three_failures_in_a_row_are_outlived(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    attempts: list[str] = []

    def flaky(source: str, target: str) -> None:
        attempts.append(target)
        if len(attempts) <= 3:
            raise StorageError("503 Slow Down")
        storage.copy_file(source, target)

    uploader = Uploader(config(tmp_path / "store"), copy=flaky)
    uploader.start(str(checkpoint(tmp_path / "own", 10)), ["part-0.safetensors", "part-1.safetensors"])
    uploader.wait()
    assert len(attempts) == 5
    assert complete(str(tmp_path / "store"))
    assert not recwarn.list


def test_a_store_that_stays_away_is_a_warning_and_training_goes_on(tmp_path: Path) -> None:
    def away(source: str, target: str) -> None:
        raise StorageError(f"cannot write {target}")

    uploader = Uploader(config(tmp_path / "store"), copy=away)
    uploader.start(str(checkpoint(tmp_path / "own", 10)), ["part-0.safetensors"])
    with pytest.warns(UserWarning, match="a checkpoint was not uploaded: cannot write"):
        uploader.wait()
    uploader.wait()  # once


def test_the_manifest_waits_for_the_files_of_other_ranks(tmp_path: Path) -> None:
    uploader = Uploader(config(tmp_path / "store"))
    folder = checkpoint(tmp_path / "own", 10)
    uploader.start(str(folder), ["part-0.safetensors"])
    target = tmp_path / "store" / folder.name

    def other_rank() -> None:
        assert MANIFEST not in names(target)
        storage.copy_file(str(folder / "part-1.safetensors"), str(target / "part-1.safetensors"))

    timer = threading.Timer(0.3, other_rank)
    timer.start()
    uploader.wait()
    timer.join()
    assert names(target) == [MANIFEST, "part-0.safetensors", "part-1.safetensors"]


def test_the_first_checkpoint_after_each_multiple_is_kept(tmp_path: Path) -> None:
    keep = config(tmp_path, keep_last=2, keep_every_images=100)
    for images in range(30, 400, 30):
        checkpoint(tmp_path, images)
        prune(str(tmp_path), keep)
    assert names(tmp_path) == [f"images-{images:012d}" for images in (120, 210, 300, 360, 390)]
