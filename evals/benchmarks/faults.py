"""Fault injection for ``train``, with real processes.

    python evals/benchmarks/faults.py --repeat 20 --repeat-others 5 --output evals/results/faults-cpu.json

A small TarFlow trains on the digits on two gloo ranks, or on one if the fault affects a single process. Every scenario
disturbs a run at a random step, starts the same command again, and compares with an undisturbed run: log and weights
must be equal to the last bit, which also shows that no sample is lost or seen twice. If the number of ranks or the ZeRO
stage changes, losses must agree to 1e-5 bits/dim.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from evals.benchmarks.fault_running import LIMIT_SECONDS, Failed, finish, gone, ranks_of, run_scenarios, start

__all__ = ["SCENARIOS", "World", "make_world"]

STEPS, BATCH, SAVE_STEPS = 50, 32, 10
CONFIG: dict[str, Any] = {
    "model": {
        "kind": "tarflow", "patch_size": 2, "width": 32, "head_width": 16, "layers_per_block": [1, 1],
        "class_conditional": True,
    },
    "optimizer": {"peak_lr": 5e-3},
    "training": {
        "total_images": STEPS * BATCH, "global_batch_size": BATCH, "micro_batch_size": 16,
        "ema_half_life_images": [20, 60], "threads": 1,
    },
    "checkpoint": {"every_images": SAVE_STEPS * BATCH, "keep_last": 10},
    "logging": {"every_images": BATCH, "preview_every_images": 10**9},
}  # fmt: skip
VOLATILE = {
    "images_per_second", "tokens_per_second", "mfu", "data_wait_fraction", "seconds", "peak_memory_bytes",
    "checkpoint_seconds", "validation_seconds", "preview_seconds",
}  # fmt: skip
"""What differs between two equal runs."""


@dataclass
class World:
    """What scenarios share: packed digits, and undisturbed runs by number of ranks."""

    folder: Path
    data: Path

    def config(self, run: Path, **changes: Any) -> list[str]:
        """A configuration file for a run, and overrides."""
        raw = json.loads(json.dumps(CONFIG))
        raw["data"] = {"path": str(changes.pop("data", self.data))}
        raw["logging"]["path"] = str(run)
        raw["registry"] = {"path": f"{run}-registry", "model": "faults"}
        run.parent.mkdir(parents=True, exist_ok=True)
        file = run.parent / f"{run.name}.yaml"
        file.write_text(yaml.safe_dump(raw))
        return [str(file), *(f"{key.replace('__', '.')}={value}" for key, value in changes.items())]

    def undisturbed(self, ranks: int) -> Path:
        """The undisturbed run, which is made once."""
        run = self.folder / f"undisturbed-{ranks}" / "run"
        if not (run / "model").exists():
            finish(start(self.config(run), ranks))
        return run


def make_world(folder: Path) -> World:
    """Pack the data."""
    shards = [f"shards.path={folder}/digits", "shards.samples_per_shard=200"]
    finish(start(["source.kind=digits", *shards], 0, verb="prepare"))
    return World(folder, folder / "digits/train")


def curve(run: Path) -> list[dict[str, Any]]:
    """The log without times, which differ between equal runs."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in VOLATILE} for line in lines]


def reach(process: "subprocess.Popen[str]", run: Path, steps: int) -> None:
    """Wait until a run has logged a number of steps."""
    deadline = time.monotonic() + LIMIT_SECONDS
    log = run / "log.jsonl"
    while not log.exists() or log.read_bytes().count(b"\n") < steps:
        if process.poll() is not None or time.monotonic() > deadline:
            raise Failed(f"a run ended before step {steps}:\n{process.communicate()[0]}")
        time.sleep(0.002)


def check_equal(run: Path, expected: Path) -> None:
    """Two runs must be equal to the last bit."""
    if curve(run) != curve(expected):
        raise Failed("the logs differ")
    for folder in ("model", "model-ema-60"):
        file = f"{folder}/model.safetensors"
        if (run / file).read_bytes() != (expected / file).read_bytes():
            raise Failed("the weights differ")


def random_step() -> int:
    """A random step for the fault, after the first checkpoint and before the end."""
    return random.randint(SAVE_STEPS + 1, STEPS - 5)


# --- scenarios: each raises `Failed`


def kill_one_rank(world: World, folder: Path) -> None:
    """Kill -9 of one of two ranks."""
    run = folder / "run"
    process = start(world.config(run), 2)
    reach(process, run, random_step())
    os.kill(random.choice(ranks_of(process)), signal.SIGKILL)
    finish(process, 1)
    finish(start(world.config(run), 2))
    check_equal(run, world.undisturbed(2))


def kill_all_ranks(world: World, folder: Path) -> None:
    """Kill -9 of the launcher and both ranks."""
    run = folder / "run"
    process = start(world.config(run), 2)
    reach(process, run, random_step())
    ranks = ranks_of(process)
    for pid in (process.pid, *ranks):
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    gone(ranks)
    finish(start(world.config(run), 2))
    check_equal(run, world.undisturbed(2))


def kill_the_launcher(world: World, folder: Path) -> None:
    """Kill -9 of the launcher alone; the same command again at once, while its ranks still run."""
    run = folder / "run"
    process = start(world.config(run), 2)
    reach(process, run, random_step())
    ranks = ranks_of(process)
    os.kill(process.pid, signal.SIGKILL)
    again = start(world.config(run), 2)
    process.communicate()
    gone(ranks)
    finish(again)
    check_equal(run, world.undisturbed(2))


def terminate_during_a_save(world: World, folder: Path) -> None:
    """SIGTERM while a checkpoint is being written."""
    run = folder / "run"
    process = start(world.config(run), 0)
    number = random.randint(1, STEPS // SAVE_STEPS - 1) * SAVE_STEPS
    save = run / f"checkpoints/images-{number * BATCH:012d}"
    deadline = time.monotonic() + LIMIT_SECONDS
    while not save.exists() and time.monotonic() < deadline:
        time.sleep(0.0005)
    process.send_signal(signal.SIGTERM)
    output = finish(process, 75)
    if "the same command continues" not in output or not (save / "manifest.json").exists():
        raise Failed(f"no checkpoint was saved:\n{output}")
    finish(start(world.config(run), 0))
    check_equal(run, world.undisturbed(0))


def full_disk_during_a_save(world: World, folder: Path) -> None:
    """The disk is full when a checkpoint is written; then there is room again."""
    disk = folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], check=True)
    try:
        run = disk / "run"
        output = finish(start(world.config(run), 0), 2)
        if "No space left on device" not in output or "the previous one is kept" not in output:
            raise Failed(f"another failure:\n{output}")
        if [one for one in (run / "checkpoints").iterdir() if not (one / "manifest.json").exists()]:
            raise Failed("a half-written checkpoint is left")
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        finish(start(world.config(run), 0))
        check_equal(run, world.undisturbed(0))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def damaged_checkpoint(world: World, folder: Path) -> None:
    """A file of the newest checkpoint is cut short or has a flipped bit: the one before it is taken, with a warning."""
    run = folder / "run"
    process = start(world.config(run), 0)
    reach(process, run, 3 * SAVE_STEPS + 2)
    process.kill()
    process.communicate()
    newest = sorted((run / "checkpoints").glob("*/manifest.json"))[-1].parent
    file = random.choice(sorted(newest.glob("*.safetensors")))
    content = bytearray(file.read_bytes())
    if random.random() < 0.5:
        content = content[: random.randrange(len(content))]
    else:
        content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    file.write_bytes(bytes(content))
    output = finish(start(world.config(run), 0))
    if f"skipping a damaged checkpoint: {newest}" not in output:
        raise Failed(f"no warning:\n{output}")
    check_equal(run, world.undisturbed(0))


def other_ranks_and_stages(world: World, folder: Path) -> None:
    """Two ranks at ZeRO 1, one at ZeRO 2, two at ZeRO 3, each stopped by SIGTERM but the last."""
    run = folder / "run"
    for ranks, stage, steps in ((2, 1, 12), (1, 2, 27), (2, 3, STEPS)):
        process = start(world.config(run, parallelism__zero_stage=stage), ranks)
        if steps < STEPS:
            reach(process, run, steps)
            process.send_signal(signal.SIGTERM)
            finish(process, 1)  # torchrun's code for any failure
        else:
            finish(process)
    found, expected = curve(run), curve(world.undisturbed(2))
    worst = max(abs(a["bits_per_dim"] - b["bits_per_dim"]) for a, b in zip(found, expected, strict=True))
    if worst > 1e-5:
        raise Failed(f"the losses differ by {worst:.2e} bits/dim")


def shard_that_disappears(world: World, folder: Path) -> None:
    """Shards vanish for two seconds during the run, then for good, then are back."""
    run, data = folder / "run", folder / "data"
    shutil.copytree(world.data, data)
    shards = sorted(data.glob("*.tar"))
    process = start(world.config(run, data=data), 0)
    reach(process, run, 8)
    for shard in shards:
        shard.rename(f"{shard}.away")
    time.sleep(2.0)
    for shard in shards:
        Path(f"{shard}.away").rename(shard)
    reach(process, run, SAVE_STEPS + 4)
    for shard in shards:
        shard.rename(f"{shard}.away")
    output = finish(process, 2)
    if "a shard could not be read during the run, in 6 attempts" not in output:
        raise Failed(f"another failure:\n{output}")
    for shard in shards:
        Path(f"{shard}.away").rename(shard)
    finish(start(world.config(run, data=data), 0))
    check_equal(run, world.undisturbed(0))


def store_that_fails(world: World, folder: Path) -> None:
    """The store of checkpoints fails three times in a row, then works; then the local ones are lost."""
    run = folder / "run"
    settings = world.config(run, checkpoint__upload_path="flaky://bucket/run")
    # The run starts with a store that fails on its 2nd to 4th write; see FLAKY.
    process = start(settings, 0, PYTHONPATH=str(flaky_store(folder)), FLAKY_FOLDER=str(folder / "store"))
    reach(process, run, 3 * SAVE_STEPS + 2)
    process.send_signal(signal.SIGTERM)
    finish(process, 75)
    shutil.rmtree(run / "checkpoints")
    finish(start(settings, 0, PYTHONPATH=str(flaky_store(folder)), FLAKY_FOLDER=str(folder / "store")))
    failures = (folder / "store/failures").read_text()
    if failures != "xxx":
        raise Failed(f"the store failed {len(failures)} times, not 3")
    check_equal(run, world.undisturbed(0))


FLAKY = '''
"""An fsspec store in a folder whose second to fourth write fail; imported by every Python that starts here."""
import os, fsspec
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

class Flaky(DirFileSystem):
    protocol = "flaky"
    def __init__(self, **options):
        os.makedirs(os.environ["FLAKY_FOLDER"], exist_ok=True)
        super().__init__(os.environ["FLAKY_FOLDER"], LocalFileSystem(auto_mkdir=True))
    @classmethod
    def _strip_protocol(cls, path):
        return path.removeprefix("flaky://").strip("/")
    def put_file(self, lpath, rpath, **options):
        folder = os.environ["FLAKY_FOLDER"]
        with open(f"{folder}/writes", "a+") as writes:
            writes.write("x"); writes.seek(0)
            number = len(writes.read())
        if 2 <= number <= 4:
            with open(f"{folder}/failures", "a") as failures:
                failures.write("x")
            raise RuntimeError("503 Slow Down")
        return super().put_file(lpath, rpath, **options)

fsspec.register_implementation("flaky", Flaky)
'''


def flaky_store(folder: Path) -> Path:
    """Make a folder that registers ``flaky://`` in every Python that has it on its path."""
    path = folder / "site"
    path.mkdir(exist_ok=True)
    (path / "sitecustomize.py").write_text(FLAKY)
    return path


SCENARIOS: tuple[Callable[[World, Path], None], ...] = (
    kill_one_rank,
    kill_all_ranks,
    kill_the_launcher,
    terminate_during_a_save,
    full_disk_during_a_save,
    damaged_checkpoint,
    other_ranks_and_stages,
    shard_that_disappears,
    store_that_fails,
)


if __name__ == "__main__":
    run_scenarios(__doc__, SCENARIOS, make_world)
