"""Fault injection for ``generate``, with real processes.

    python evals/benchmarks/generation_faults.py --output evals/results/generation-faults-cpu.json

Two Ray workers generate 10,000 digits. Every file must be byte for byte equal to that of one undisturbed process. A
small generation is killed with SIGKILL, or meets a full disk, before and after every system call that writes (fsync,
link, rename, unlink); the same command again must give the result of an undisturbed generation.
"""

import contextlib
import io
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from evals.benchmarks import s3_server
from evals.benchmarks.fault_running import (
    LIMIT_SECONDS,
    MARKER,
    Failed,
    all_gone,
    finish,
    kill_one,
    processes,
    run_scenarios,
    start,
)
from evals.benchmarks.faults import make_world as make_training_world
from evals.benchmarks.write_points import disturbed_at, fill_disk, kill_self
from tarflow_scale import storage
from tarflow_scale.config.generate import GenerateConfig
from tarflow_scale.verbs.generate.driver import run

__all__ = ["SCENARIOS", "World", "make_world"]

KILLS_OF_DRIVERS = 0.1
"""Share of kills that hit the driver; the others hit workers."""


@dataclass
class World:
    """A registry with one version, the amount of work and of faults, and the undisturbed result.

    Every ``stride``-th write point of a small generation is disturbed.
    """

    folder: Path
    registry: Path
    num_images: int
    kills: int
    stride: int
    expected: dict[str, bytes]

    def arguments(self, output: Path | str, *more: str) -> list[str]:
        """Of a generation into ``output``."""
        return [
            f"registry.path={self.registry}",
            "registry.model=faults",
            f"sampling.num_images={self.num_images}",
            "sampling.batch_size=50",
            "sampling.seed=3",
            f"shards.path={output}",
            "shards.samples_per_shard=100",
            "cluster.num_workers=2",
            *more,
        ]

    def check(self, output: Path | str) -> None:
        """Every file must be that of an undisturbed generation."""
        same(content(output), self.expected)


def content(location: Path | str) -> dict[str, bytes]:
    """Every file below a folder or URL by its relative path, except temporary files of killed processes."""
    found = (file.name for file in storage.walk(str(location)) if not file.name.endswith(".partial"))
    return {name: storage.read_bytes(storage.join(str(location), name)) for name in found}


def same(found: dict[str, bytes], expected: dict[str, bytes]) -> None:
    """Names and bytes must be equal."""
    if found != expected:
        names = sorted(set(found) ^ set(expected)) or [name for name in found if found[name] != expected[name]]
        raise Failed(f"files differ: {names[:5]}")


def make_world(folder: Path, num_images: int = 10_000, kills: int = 50, stride: int = 1) -> World:
    """Pack, train, and generate without any disturbance."""
    trained = make_training_world(folder).undisturbed(0)
    world = World(folder, Path(f"{trained}-registry"), num_images, kills, stride, {})
    finish(start(world.arguments(folder / "plain", "cluster.executor=local"), 0, verb="generate"))
    world.expected = content(folder / "plain")
    return world


def begin(world: World, folder: Path) -> "subprocess.Popen[str]":
    return start(world.arguments(folder / "out"), 0, verb="generate", **{MARKER: str(folder)})


def kill_workers_and_drivers(world: World, folder: Path) -> int:
    """Kill -9 of workers, and of one driver in ten, at random moments; the same command again until it is done."""
    killed: set[int] = set()
    deadline = time.monotonic() + 20 * LIMIT_SECONDS
    process = begin(world, folder)
    while process.poll() is None or process.returncode == -signal.SIGKILL or len(killed) < world.kills:
        if time.monotonic() > deadline:
            raise Failed(f"not done after {len(killed)} kills")
        if process.poll() is not None:
            if process.returncode not in (0, -signal.SIGKILL):
                raise Failed(f"exit code {process.returncode}:\n{process.communicate()[0]}")
            if process.returncode == 0:  # done before all kills: some shards are lost, and it begins again
                world.check(folder / "out")
                tars = sorted((folder / "out").glob("*.tar"))
                for tar in random.sample(tars, len(tars) // 2):
                    tar.unlink()
            process.communicate()
            process = begin(world, folder)
        time.sleep(random.uniform(0.05, 0.8))
        if len(killed) >= world.kills:
            continue
        fresh = [pid for pid in processes(folder, b"ray::_Host") if pid not in killed]
        if fresh:  # only where work is going on
            kill_one([process.pid] if random.random() < KILLS_OF_DRIVERS else fresh, killed)
    finish(process)
    world.check(folder / "out")
    all_gone(folder)
    return len(killed)


def two_drivers(world: World, folder: Path) -> None:
    """Two drivers on one folder at once; one of them is killed."""
    first, second = begin(world, folder), begin(world, folder)
    while not list((folder / "out").glob("*.tar")):
        if first.poll() is not None or second.poll() is not None:
            raise Failed(f"a driver ended early:\n{first.communicate()[0]}\n{second.communicate()[0]}")
        time.sleep(0.05)
    time.sleep(random.uniform(0, 2))
    first.kill()
    first.communicate()
    finish(second)
    world.check(folder / "out")
    all_gone(folder)


def _generate(world: World, output: Path) -> None:
    """A small generation in this process, with all additional outputs."""
    torch.set_num_threads(1)
    config = {
        "registry": {"path": str(world.registry), "model": "faults"},
        "sampling": {"num_images": 50, "batch_size": 10, "seed": 3},
        "shards": {"path": str(output / "out"), "samples_per_shard": 30, "npz": str(output / "samples.npz")},
        "cluster": {"executor": "local"},
    }
    quiet = io.StringIO()
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        run(GenerateConfig.model_validate(config), dry_run=False)


def _disturbed_everywhere(world: World, folder: Path, disturb: Callable[[], object], code: int) -> int:
    """Disturb at every ``world.stride``-th write point, then generate again; returns how many there were."""

    def generate_into(name: str, point: int = -1) -> tuple[int, int]:
        return disturbed_at(lambda: _generate(world, folder / name), point, disturb)

    ended, points = generate_into("undisturbed")
    if ended or points < 2:
        raise Failed(f"undisturbed it ended with {ended} after {points} points")
    expected = content(folder / "undisturbed")
    chosen = range(random.randrange(world.stride), points, world.stride)
    for point in chosen:
        ended, _ = generate_into("disturbed", point)
        if ended != code:
            raise Failed(f"at point {point} it ended with {ended}")
        manifest = folder / "disturbed/out/manifest.json"
        if manifest.exists() and manifest.read_bytes() != expected["out/manifest.json"]:
            raise Failed(f"at point {point} it left half a manifest")
        ended, _ = generate_into("disturbed")
        if ended:
            raise Failed(f"after point {point} it ended with {ended}")
        same(content(folder / "disturbed"), expected)
        shutil.rmtree(folder / "disturbed")
    return len(chosen)


def killed_at_every_write(world: World, folder: Path) -> int:
    """A generation killed with SIGKILL before and after every write, then started again."""
    return _disturbed_everywhere(world, folder, kill_self, -signal.SIGKILL)


def disk_full_at_every_write(world: World, folder: Path) -> int:
    """The same with a full disk at every write: one line, and the same command again succeeds."""
    return _disturbed_everywhere(world, folder, fill_disk, 2)


def busy_store(world: World, folder: Path) -> None:
    """A generation into S3 that answers 503 for three seconds of every six."""
    with s3_server.here("bucket") as bucket:
        process = start(world.arguments(f"{bucket}/out"), 0, verb="generate", **{MARKER: str(folder)})
        deadline = time.monotonic() + LIMIT_SECONDS
        while process.poll() is None and time.monotonic() < deadline:
            s3_server.be_busy(3)
            time.sleep(6)
        finish(process)
        world.check(f"{bucket}/out")
    all_gone(folder)


SCENARIOS = (
    kill_workers_and_drivers,
    two_drivers,
    killed_at_every_write,
    disk_full_at_every_write,
    busy_store,
)


if __name__ == "__main__":
    run_scenarios(__doc__, SCENARIOS, make_world)
