"""Fault injection for the registry, with real processes.

    python evals/benchmarks/registry_faults.py --output evals/results/registry-faults-cpu.json

Races have 200 rounds; in each, 16 processes promote different versions at the same time, and exactly one must win. A
change of the registry is killed with SIGKILL, or meets a full disk, before and after every system call that writes
(fsync, link, rename, unlink). Afterwards the champion must be readable and every digest right, and the same change
again must give the result of an undisturbed one.
"""

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, Literal

from evals.benchmarks import s3_server
from evals.benchmarks.fault_running import Failed, run_scenarios
from evals.benchmarks.write_points import disturbed_at, fill_disk, kill_self
from tarflow_scale.errors import RegistryError
from tarflow_scale.registry import Registry, Store, collection

__all__ = ["SCENARIOS", "World", "make_world"]

MODEL, RACERS = "m", 16
FACTS: dict[str, Any] = {
    "pixels": {"bit_depth": 4, "noise": "uniform"},
    "data": {
        "name": "d", "split": "train", "digest": "0", "image_size_pixels": 8, "num_channels": 1, "class_names": [],
        "num_images": 10,
    },
    "parameters": 3, "images_seen": 100, "ema_half_life_images": 10, "config_digest": "c", "git_commit": "unknown",
    "packages": {},
}  # fmt: skip
_DAY = 86400.0


@dataclass
class World:
    """Number of rounds of a race; every ``stride``-th write point is disturbed."""

    folder: Path
    rounds: int
    stride: int


def make_world(folder: Path, rounds: int = 200, stride: int = 1) -> World:
    """Nothing is shared but numbers."""
    return World(folder, rounds, stride)


def register(path: str, number: int) -> int:
    """A version of its own content."""
    files = {"model.safetensors": f"weights {number}".encode() * 50, "config.json": b"{}"}
    return Registry(path, MODEL).register(files, FACTS, "fault injection", b'{"seed": 0}').version


# -- races -------------------------------------------------------------------------------------------------------------


def _entry(racer: int, number: int) -> int:
    """The version that a racer promotes in a round, never one of the round before."""
    return 1 + racer + RACERS * (number % 2)


def _race(path: str, racer: int, rounds: int, barrier: Barrier, wins: Any) -> None:
    registry = Registry(path, MODEL)
    for number in range(rounds):
        holder = registry.state().aliases.get("champion")
        barrier.wait()
        with contextlib.suppress(RegistryError):
            registry.promote("champion", _entry(racer, number), holder, {"gate": "race"}, f"round {number}")
            wins[number * RACERS + racer] = 1
        barrier.wait()


def race(path: str, rounds: int, start: Literal["spawn", "fork"] = "spawn") -> int:
    """Run rounds of concurrent promotions and check their results. Returns the number of rounds.

    ``fork`` starts the processes faster; it needs a parent without threads and a local path.
    """
    for number in range(2 * RACERS):
        register(path, number)
    context = multiprocessing.get_context("fork") if start == "fork" else multiprocessing.get_context("spawn")
    barrier, wins = context.Barrier(RACERS), context.Array("i", RACERS * rounds)
    racers = [context.Process(target=_race, args=(path, racer, rounds, barrier, wins)) for racer in range(RACERS)]
    for one in racers:
        one.start()
    for one in racers:
        one.join(600)
    if any(one.exitcode for one in racers):
        raise Failed(f"a racer ended with {[one.exitcode for one in racers]}")
    winners = [[racer for racer in range(RACERS) if wins[number * RACERS + racer]] for number in range(rounds)]
    if any(len(several) != 1 for several in winners):
        raise Failed(f"winners of each round: {winners}")
    state = Registry(path, MODEL).replayed()
    moved = [fact.version for fact in state.history if fact.kind == "promote"]
    if (
        moved != [_entry(several[0], number) for number, several in enumerate(winners)]
        or state.aliases["champion"] != moved[-1]
    ):
        raise Failed("the log does not say who won")
    return rounds


def race_to_promote(world: World, folder: Path) -> int:
    """Rounds of 16 processes that promote different versions at once, on a local file system: exactly one wins."""
    return race(str(folder / "registry"), world.rounds)


def race_to_promote_on_s3(world: World, folder: Path) -> int:
    """The same on a server of the S3 protocol."""
    with s3_server.here("bucket") as path:
        return race(f"{path}/{folder.name}", world.rounds)


# -- disturbed at every write ------------------------------------------------------------------------------------------


CHANGES: dict[str, Callable[[str], object]] = {
    "register": lambda path: register(path, 7),
    "promote": lambda path: _to(path, 2),
    "rollback": lambda path: _back(path),
    "retire": lambda path: _retire(path),
    "collect": lambda path: _collect(path),
}


def _to(path: str, version: int) -> None:
    registry = Registry(path, MODEL)
    holder = registry.state().aliases.get("champion")
    if holder != version:
        registry.promote("champion", version, holder, {"gate": "g"}, "better")


def _back(path: str) -> None:
    registry = Registry(path, MODEL)
    if registry.state().aliases["champion"] != 1:
        registry.rollback("champion", "worse")


def _retire(path: str) -> None:
    registry = Registry(path, MODEL)
    if 3 not in registry.state().retired:
        registry.retire(3, "worse")


def _collect(path: str) -> None:
    collection.collect(path, collection.garbage(path, 7 * _DAY), 7 * _DAY, "test")


def _prepared(path: str, name: str) -> None:
    """A registry that the change applies to, one event before its next snapshot."""
    for number in range(4):
        register(path, number)
    _to(path, 1)
    registry = Registry(path, MODEL)
    if name == "rollback":
        _to(path, 2)
    if name == "collect":
        registry.retire(4, "worse")
        registry.keep(b"dropped")
        # as if ten days had passed: the event is written again with its checksum, and blobs are old
        event = registry.log.read(registry.state().number)
        early = time.time() - 10 * _DAY
        past = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(early))
        sealed = event.model_copy(update={"time": past, "checksum": ""}).sealed()
        Path(registry.log.location(event.number)).write_bytes(sealed.to_json())
        for blob in Path(path, "blobs/sha256").iterdir():
            os.utime(blob, (early, early))
        return
    while Registry(path, MODEL).state().number < 49:
        registry.append("approve", "", lambda state: {"version": 2, "user": f"user {state.number}"})


def _summary(path: str) -> str:
    """The state of the registry, without times and counts of events."""
    registry = Registry(path, MODEL)
    state = registry.replayed()
    return json.dumps([sorted(state.versions), state.aliases, sorted(state.retired), sorted(state.collected)])


def _check(path: str) -> None:
    """Check that the champion is readable, and that every needed blob matches its digest."""
    registry = Registry(path, MODEL)
    registry.read_files(registry.resolve("champion"))
    state = registry.replayed()
    needed = {
        record.sha256: name
        for number in state.versions
        if number not in state.collected
        for name, record in collection.named_by(state, number)
    }
    if problems := Store(path).problems(needed, lambda _: None):
        raise Failed(f"after the fault: {problems}")


def disturbed_everywhere(world: World, folder: Path, disturb: Callable[[], object], code: int) -> int:
    """Every change, disturbed at every point at which it writes; returns the number of points."""
    disturbed = 0
    for name, change in CHANGES.items():
        template, undisturbed = folder / f"{name}-template", folder / f"{name}-undisturbed"
        _prepared(str(template), name)
        shutil.copytree(template, undisturbed)
        done, points = disturbed_at(lambda p=undisturbed, c=change: c(str(p)), -1, disturb)
        if done or points < 2:
            raise Failed(f"{name} undisturbed ended with {done} after {points} points")
        expected = _summary(str(undisturbed))
        for point in range(random.randrange(world.stride), points, world.stride):
            path = folder / f"{name}-{point}"
            shutil.copytree(template, path)
            ended, _ = disturbed_at(lambda p=path, c=change: c(str(p)), point, disturb)
            if ended not in (code, 0):  # 0: a cache that could not be written is no failure
                raise Failed(f"{name} at point {point} ended with {ended}")
            _check(str(path))
            change(str(path))
            if _summary(str(path)) != expected:
                raise Failed(f"{name} at point {point}: {_summary(str(path))}, not {expected}")
            _check(str(path))
            shutil.rmtree(path)
            disturbed += 1
    return disturbed


def killed_at_every_write(world: World, folder: Path) -> int:
    """Register, promote, roll back, retire and collect, killed with SIGKILL before and after every write."""
    return disturbed_everywhere(world, folder, kill_self, -signal.SIGKILL)


def disk_full_at_every_write(world: World, folder: Path) -> int:
    """The same with a full disk at every write: one line, and the same change again succeeds."""
    return disturbed_everywhere(world, folder, fill_disk, 2)


def flipped_bytes(world: World, folder: Path) -> int:
    """A random byte of each event and each file is changed: detected, named and refused."""
    del world
    path = folder / "registry"
    _prepared(str(path), "register")
    names = sorted([*path.glob("m/_log/*.json"), *path.glob("blobs/sha256/*")])
    for file in names:
        content = bytearray(file.read_bytes())
        place = random.randrange(len(content))
        content[place] ^= 1 << random.randrange(8)
        before = file.read_bytes()
        file.write_bytes(bytes(content))
        try:
            _check(str(path))
        except (Failed, RegistryError) as found:
            if file.name not in str(found):
                raise Failed(f"{file.name} was changed, but the error is: {found}") from found
        else:
            raise Failed(f"{file} was changed at byte {place}, and nobody noticed")
        file.write_bytes(before)
    _check(str(path))
    return len(names)


def busy_store(world: World, folder: Path) -> None:
    """A store that answers 503 for three seconds while a version is registered and promoted."""
    del world
    with s3_server.here("bucket") as bucket:
        path = f"{bucket}/{folder.name}"
        register(path, 0)
        s3_server.be_busy(3)
        register(path, 1)
        s3_server.be_busy(3)
        _to(path, 2)
        _check(path)
        state = Registry(path, MODEL).replayed()
        if (state.aliases, len(state.versions)) != ({"champion": 2}, 2):
            raise Failed("the registry lost something")


SCENARIOS = (
    race_to_promote,
    race_to_promote_on_s3,
    killed_at_every_write,
    disk_full_at_every_write,
    flipped_bytes,
    busy_store,
)


if __name__ == "__main__":
    run_scenarios(__doc__, SCENARIOS, make_world)
