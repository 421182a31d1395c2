"""Fault injection for ``evaluate``, with real processes.

    python evals/benchmarks/evaluation_faults.py --repeat 10 --output evals/results/evaluation-faults-cpu.json

A small TarFlow of the digits is evaluated by five protocols on two Ray workers: samples, features, moments, measures
and bits/dim. Every number, its standard error and the baselines must equal, to the last bit, those of one undisturbed
process.
"""

import json
import random
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

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
from tarflow_scale.registry import Registry

__all__ = ["SCENARIOS", "World", "make_world"]

MODEL = "faults"
PIXELS = {"extractor": "pixels", "num_images": 600, "bit_depth": 4}
SUBSET = {"num_reference_images": 400}
PROTOCOLS: tuple[dict[str, Any], ...] = (
    {"name": "frechet", "metric": "frechet", **PIXELS},
    {"name": "infinity", "metric": "frechet", "estimate": "infinity", **PIXELS},
    {"name": "kernel", "metric": "kernel", "num_subsets": 5, "subset_size": 100, **PIXELS, **SUBSET},
    {"name": "precision", "metric": "precision", **PIXELS, **SUBSET},
    {"name": "bits_per_dim", "metric": "bits_per_dim", "bit_depth": 4, "num_draws": 10},
)


@dataclass
class World:
    """A registry with one version, its data and protocols, and the numbers of an undisturbed evaluation."""

    folder: Path
    registry: Path
    kills: int
    expected: Any = None

    def arguments(self, folder: Path, *more: str) -> list[str]:
        """Of an evaluation with a registry and parts of its own in ``folder``."""
        if not (folder / "registry").exists():
            shutil.copytree(self.registry, folder / "registry")
        protocols = [str(self.folder / f"{facts['name']}.yaml") for facts in PROTOCOLS]
        return [
            f"registry.path={folder}/registry",
            f"registry.model={MODEL}",
            f"data.path={self.folder}/digits/test",
            f"reference.path={self.folder}/digits/train",
            f"reference.cache={folder}/references",
            f"metrics.protocols={json.dumps(protocols)}",
            "cluster.num_workers=2",
            *more,
        ]

    def found(self, folder: Path) -> Any:
        """The numbers of the newest report."""
        reports = Registry(str(folder / "registry"), MODEL).state().reports
        if not reports:
            raise Failed("no report")
        newest = reports[max(reports)][-1]
        return newest.metrics, newest.baselines

    def check(self, folder: Path) -> None:
        """The numbers must be those of an undisturbed evaluation."""
        if self.found(folder) != self.expected:
            raise Failed("the numbers differ")


def make_world(folder: Path, kills: int = 10) -> World:
    """Pack, train, and evaluate without any disturbance; `kill_workers` is to kill so many."""
    training = make_training_world(folder)
    run = training.undisturbed(0)
    for facts in PROTOCOLS:
        (folder / f"{facts['name']}.yaml").write_text(yaml.safe_dump(facts), encoding="utf-8")
    world = World(folder, Path(f"{run}-registry"), kills=kills)
    plain = folder / "plain"
    plain.mkdir()
    finish(start(world.arguments(plain, "cluster.executor=local"), 0, verb="evaluate"))
    world.expected = world.found(plain)
    return world


def begin(world: World, folder: Path, *more: str) -> "subprocess.Popen[str]":
    return start(world.arguments(folder, *more), 0, verb="evaluate", **{MARKER: str(folder)})


def reach(process: "subprocess.Popen[str]", folder: Path, parts: int) -> None:
    """Wait until an evaluation has written a number of parts."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while len(list((folder / "references/parts").rglob("*.npz"))) < parts:
        if process.poll() is not None or time.monotonic() > deadline:
            raise Failed(f"no {parts} parts:\n{process.communicate()[0]}")
        time.sleep(0.01)


# --- scenarios: each raises `Failed`


def kill_workers(world: World, folder: Path) -> None:
    """Kill -9 of workers, ten times, at random moments."""
    killed: set[int] = set()
    deadline = time.monotonic() + LIMIT_SECONDS
    attempt = 0
    while len(killed) < world.kills:  # an evaluation that ended meanwhile starts again with its own parts
        attempt += 1
        own = folder / str(attempt)
        own.mkdir()
        process = begin(world, own)
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(random.uniform(0.1, 1.0))
            fresh = [pid for pid in processes(own, b"ray::_Host") if pid not in killed]
            if fresh and len(killed) < world.kills:
                kill_one(fresh, killed)
        finish(process)
        world.check(own)
        all_gone(own)


def kill_the_driver(world: World, folder: Path) -> None:
    """Kill -9 of the command at a random moment, then the same command again; nothing of the first is left running."""
    process = begin(world, folder)
    reach(process, folder, random.randint(1, 6))
    process.kill()
    process.communicate()
    all_gone(folder)
    if Registry(str(folder / "registry"), MODEL).state().reports:
        raise Failed("a number came out of a part of the job")
    finish(begin(world, folder))
    world.check(folder)


def kill_a_node(world: World, folder: Path) -> None:
    """A node of the cluster dies with its worker, and there is no other place for that worker."""
    from ray.cluster_utils import Cluster

    here: dict[str, Any] = {"node_ip_address": "127.0.0.1"}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, **here})
    try:
        node = cluster.add_node(num_cpus=1, **here)
        cluster.wait_for_nodes()
        process = begin(world, folder, f"cluster.address={cluster.address}")
        reach(process, folder, random.randint(2, 16))
        cluster.remove_node(node, allow_graceful=False)
        finish(process)
    finally:
        cluster.shutdown()
    world.check(folder)


SCENARIOS = (kill_workers, kill_the_driver, kill_a_node)


if __name__ == "__main__":
    run_scenarios(__doc__, SCENARIOS, make_world)
