"""Packing: what its processes cost."""

import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from tarflow_scale.shards.images import encode_png
from tests.conftest import TOP

LIGHT = """
import sys
from tarflow_scale import cli
assert cli.main(sys.argv[1:]) == 0
heavy = {"torch", "webdataset", "ray", "deepspeed", "sklearn"} & set(sys.modules)
assert not heavy, heavy
"""


def write_images(path: Path, num: int) -> None:
    rng = np.random.default_rng(0)
    for i in range(num):
        (path / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        (path / "ab"[i % 2] / f"{i:04d}.png").write_bytes(encode_png(rng.integers(0, 256, (3, 48, 48), np.uint8)))


def peak_mebibytes(pid: str) -> float | None:
    """The largest resident size that a packing worker had; None for another process, or one that has ended."""
    try:
        if "spawn_main" not in Path(f"/proc/{pid}/cmdline").read_text():
            return None
        found = re.search(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(found[1]) / 1024 if found else None


def test_a_packing_worker_stays_below_150_mebibytes(tmp_path: Path) -> None:
    """With torch, which webdataset imports, each was 724 MiB."""
    write_images(tmp_path / "images", 200)
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "tarflow_scale", "prepare", "source.kind=folder", f"source.path={tmp_path}/images"),
            *(f"shards.path={tmp_path}/out", "shards.num_workers=2", "shards.samples_per_shard=4"),
        ],
        cwd=TOP,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    peaks: dict[str, float] = {}
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while process.poll() is None:
        try:
            pids = children.read_text().split()
        except (FileNotFoundError, ProcessLookupError):
            break
        peaks |= {pid: peak for pid in pids if (peak := peak_mebibytes(pid)) is not None}
        time.sleep(0.005)
    assert process.wait() == 0
    assert len(peaks) >= 2
    assert 20 < max(peaks.values()) < 150


def test_prepare_does_not_import_torch(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 10)
    arguments = ["source.kind=folder", f"source.path={tmp_path}/images", f"shards.path={tmp_path}/out"]
    for words in (arguments, ["--check", f"{tmp_path}/out/train"], ["--stats", f"{tmp_path}/out/train"]):
        subprocess.run([sys.executable, "-c", LIGHT, "prepare", *words], cwd=TOP, check=True, stdout=subprocess.DEVNULL)
