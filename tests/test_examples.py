"""The example scripts, run as their headers say: pictures of the right size, and numbers that the library gives too."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tarflow_scale import load
from tarflow_scale.density import image_bits_per_dim
from tarflow_scale.density.anomaly import compressed_bits_per_dim, scores_of, threshold
from tarflow_scale.shards.images import encode_png
from tarflow_scale.shards.reader import ShardSet
from tests.conftest import TOP, Trained, command
from tests.forking import HANG_SECONDS


def run(name: str, trained: Trained, output: Path, *more: str) -> str:
    where = [f"--registry={trained.registry}", "--model=small@1", f"--data={trained.data}/test", f"--output={output}"]
    result = command(*where, *more, module=f"launch.examples.{name}")
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture
def own(trained: Trained, tmp_path: Path) -> Path:
    """A folder of a user's images: three digits."""
    for i, image in enumerate(ShardSet(f"{trained.data}/test").take(np.arange(3)).events):
        (tmp_path / "own").mkdir(exist_ok=True)
        (tmp_path / f"own/{i}.png").write_bytes(encode_png(image))
    return tmp_path / "own"


def size(rows: int, columns: int, zoom: int) -> tuple[int, int]:
    return (columns * 9 + 1) * zoom, (rows * 9 + 1) * zoom


def test_sampling(trained: Trained, own: Path, tmp_path: Path) -> None:
    said = run("sampling", trained, tmp_path / "out", f"--images={own}")
    for name, rows, columns in (("classes", 8, 10), ("temperatures", 5, 10), ("between", 5, 11)):
        with Image.open(tmp_path / f"out/{name}.png") as picture:
            assert picture.size == size(rows, columns, zoom=5)
            assert len(np.unique(np.asarray(picture))) > 8
    images = ShardSet(f"{trained.data}/test").take(np.arange(3)).events
    bits = image_bits_per_dim(load("small@1", registry=str(trained.registry)), images, num_draws=8)
    (found,) = re.findall(r"bits/dim of 3 images: ([\d.]+), from ([\d.]+) to ([\d.]+)", said)
    assert [float(number) for number in found] == pytest.approx([bits.mean(), bits.min(), bits.max()], abs=2e-4)


def test_anomaly(trained: Trained, own: Path, tmp_path: Path) -> None:
    said = run("anomaly", trained, tmp_path / "out", f"--images={own}", "--rate=0.1")
    with Image.open(tmp_path / "out/surprise.png") as picture:
        assert picture.size == size(1, 8, zoom=8)
        pixels = np.asarray(picture).astype(int)
        assert (pixels[..., 0] > pixels[..., 1]).any()  # red lies over some
    flow, images = (
        load("small@1", registry=str(trained.registry)),
        ShardSet(f"{trained.data}/test").take(np.arange(359)).events,
    )
    halves: list[dict[str, np.ndarray]] = []
    for some in (images[:179], images[179:]):
        bits = image_bits_per_dim(flow, some, num_draws=4, estimate="importance")
        typical = float(halves[0]["likelihood"].mean()) if halves else float(bits.mean())
        halves.append(scores_of(bits, compressed_bits_per_dim(some >> 4), typical, None))
    limits = {score: threshold(values, 0.1) for score, values in halves[0].items()}
    expected = [f"{(halves[1][score] > limit).mean():.1%}" for score, limit in limits.items()]
    table = {line[:20].strip(): line[20:].split() for line in said.splitlines()}
    assert table["flagged images of"] == list(limits)
    assert table["normal"] == expected
    assert float(table["shuffled pixels"][0].rstrip("%")) > 50
    assert table[str(own)[-20:]] != []
    assert re.search(r"\d+% of the normal images are less likely than the bar", said)


@pytest.mark.slow
def test_posterior() -> None:
    result = command(module="launch.examples.posterior")
    assert result.returncode == 0, result.stderr
    (means,) = re.findall(r"mean \[(.*)\], standard", result.stdout)
    assert [float(mean) for mean in means.split(",")] == pytest.approx([0.0, 1.125], abs=0.4)  # E x, E x^2 / 2


@pytest.mark.parametrize("name", ["sampling", "anomaly"])
def test_without_the_demo_there_is_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "example.py").symlink_to(TOP / f"launch/examples/{name}.py")
    result = command(module="example", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("no registry at runs/demo/registry; ")
    assert result.stderr.endswith("; 'make demo' creates the default inputs of this example\n")
    assert result.stderr.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} <= {"example.py", "__pycache__"}


SMALLER = {
    "prepare": ["shards.samples_per_shard=20"],
    "train": [
        "model.width=16",
        "model.steps_per_level=2",
        "training.total_images=2560",
        "training.global_batch_size=32",
        "training.micro_batch_size=16",
        "validation.every_images=1280",
        "schedule.warmup_images=640",
        "schedule.decay_images=640",
    ],
    "evaluate": ["cluster.executor=local"],
    "promote": [],
    "generate": ["cluster.executor=local", "sampling.num_images=8", "sampling.batch_size=4"],
    "score": ["cluster.executor=local"],
    "report": [],
}


def torchrun(folder: Path, *command: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["bash", *command],
        cwd=folder,
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.distributed
def test_own_images_go_all_the_way_by_the_commands_of_the_readme(tmp_path: Path) -> None:
    """A stranger's first hour, smaller: each line as it is written, on a folder of photographs' size and kind."""
    generator = np.random.default_rng(0)
    for i in range(60):
        top, bottom = generator.uniform(40, 216, 2)
        ramp = np.linspace(top, bottom, 40)[:, None, None] + generator.normal(0, 2, (40, 48, 3))
        folder = tmp_path / "my/images" / ("dark" if ramp.mean() < 128 else "bright")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(ramp.clip(0, 255).astype(np.uint8)).save(folder / f"photo {i}.png")
    for name in ("configs", "evals", "launch"):
        (tmp_path / name).symlink_to(TOP / name)
    (block,) = re.findall(r"## Your own images\n.*?```sh\n(.*?)```", (TOP / "README.md").read_text(), flags=re.DOTALL)
    lines = [shlex.split(line, comments=True) for line in block.splitlines()]
    assert lines.pop(0)[0] == "source"
    assert len(lines) == 9
    for line in lines:
        verb = "train" if line[0].startswith("launch/") else line[1]
        more = [] if line[2].startswith("--") else SMALLER[verb]
        result = torchrun(tmp_path, *line, *more) if verb == "train" else command(*line[1:], *more, cwd=tmp_path)
        assert result.returncode == 0, f"{line}: {result.stdout}{result.stderr}"
        assert "Warning" not in result.stderr, result.stderr
    with Image.open(tmp_path / "runs/mine-generated/grid.png") as picture:
        assert picture.mode == "RGB"
    assert len([*(tmp_path / "runs/mine-generated/files").rglob("*.png")]) == 8
    assert len((tmp_path / "runs/mine-scores/scores.csv").read_text().splitlines()) == 49  # of 60, a fifth is held out
    assert "mine@1" in (tmp_path / "runs/mine-report/index.html").read_text()
