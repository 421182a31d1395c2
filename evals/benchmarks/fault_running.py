"""Shared parts of fault injection: processes with an expected exit code and a time limit, and the table of results."""

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from evals.benchmarks.measuring import Figure, write_results

__all__ = [
    "LIMIT_SECONDS",
    "MARKER",
    "Failed",
    "all_gone",
    "finish",
    "gone",
    "kill_one",
    "processes",
    "ranks_of",
    "run_scenarios",
    "start",
]

LIMIT_SECONDS = 1500.0
"""Only what hangs takes so long, on a machine of any speed."""
MARKER = "TARFLOW_SCALE_FAULTS"
"""Environment variable by which processes of a scenario are found; it holds its folder."""


class Failed(Exception):
    """A scenario did not end as expected."""


def _launch(*arguments: str, ranks: int, environment: dict[str, str], **options: Any) -> "subprocess.Popen[str]":
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"] if ranks else []
    command = [sys.executable, "-m", *launcher, "tarflow_scale", *arguments]
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment, text=True, **options)


launch: Callable[..., "subprocess.Popen[str]"] = _launch
"""Starts the command line; tests put `tests.forking.start` in its place."""


def start(arguments: list[str], ranks: int, verb: str = "train", **environment: str) -> "subprocess.Popen[str]":
    """Start a verb; ``ranks`` of 0 is a process without a launcher."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return launch(verb, *arguments, ranks=ranks, environment=environment, start_new_session=True, **streams)


def finish(process: "subprocess.Popen[str]", code: int = 0) -> str:
    """Wait for the end of a process and check its exit code. Returns the output."""
    try:
        output, _ = process.communicate(timeout=LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise Failed(f"a run hangs:\n{process.communicate()[0]}") from None
    if process.returncode != code:
        raise Failed(f"exit code {process.returncode}, not {code}:\n{output}")
    return output


def ranks_of(process: "subprocess.Popen[str]") -> list[int]:
    """The processes that a launcher started."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def gone(pids: list[int]) -> None:
    """Wait until processes have ended."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids):
        if time.monotonic() > deadline:
            raise Failed("a process does not end")
        time.sleep(0.02)


def processes(folder: Path, name: bytes = b"") -> list[int]:
    """Processes of a scenario whose command line has this start; they have the folder in their environment."""
    found: list[int] = []
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            command, environment = (process / "cmdline").read_bytes(), (process / "environ").read_bytes()
        except OSError:
            continue
        if command and command.startswith(name) and f"{MARKER}={folder}\0".encode() in environment:
            found.append(int(process.name))
    return found


def kill_one(pids: list[int], killed: set[int]) -> None:
    """Kill a random process with SIGKILL and add it to ``killed``, unless it has already ended."""
    victim = random.choice(pids)
    with contextlib.suppress(ProcessLookupError):
        os.kill(victim, signal.SIGKILL)
        killed.add(victim)


def all_gone(folder: Path) -> None:
    """Wait until all processes of a scenario have ended."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while left := processes(folder):
        if time.monotonic() > deadline:
            raise Failed(f"processes are left: {left}")
        time.sleep(0.1)


def run_scenarios(
    text: str | None,
    scenarios: Sequence[Callable[..., int | None]],
    make_world: Callable[[Path], Any],
    notes: Callable[[Any, str, Path], None] | None = None,
) -> None:
    """The command line of a script: every scenario several times, with a table of what survived.

    Args:
        text: the script's docstring.
        scenarios: called with the world and an empty folder; each raises `Failed`, says in a line what it does, and may
            return in how many cases it did so.
        make_world: makes, in a folder, what scenarios share.
        notes: called after each run with the world, the scenario's name and its folder; what it puts into
            ``world.notes`` goes into the results.
    """
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=1, help="runs of each scenario")
    parser.add_argument("--repeat-others", type=int, help="runs of those that are no kill -9; default: as many")
    parser.add_argument("--only", nargs="*", help="names of scenarios; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    figures: dict[str, Figure] = {}
    with tempfile.TemporaryDirectory() as top:
        world = make_world(Path(top) / "world")
        for scenario in scenarios:
            if arguments.only and scenario.__name__ not in arguments.only:
                continue
            survived, cases, runs = 0, 0, arguments.repeat
            if arguments.repeat_others and not scenario.__name__.startswith("kill_"):
                runs = arguments.repeat_others
            for number in range(runs):
                folder = Path(top) / f"{scenario.__name__}-{number}"
                folder.mkdir()
                try:
                    cases += scenario(world, folder) or 0
                    survived += 1
                except Failed as failure:
                    print(f"{scenario.__name__} {number}: {failure}", file=sys.stderr)
                print(f"{scenario.__name__}: {survived} of {number + 1}", file=sys.stderr)
                if notes:
                    notes(world, scenario.__name__, folder)
                shutil.rmtree(folder)
            figures[scenario.__name__] = (f"{runs}", float(survived), f"survived of {runs}")
            if cases:
                figures[f"{scenario.__name__}_cases"] = ("", float(cases), "in these runs")
    lost = sum(float(asked) - got for asked, got, _ in figures.values() if asked)
    figures["runs_with_lost_or_doubled_samples_or_failed"] = ("0", lost, "runs")
    if arguments.output:
        faults = {one.__name__: (one.__doc__ or "").strip() for one in scenarios}
        more = world.notes if notes else {}
        write_results(arguments.output, "cpu", figures, seeds={"steps": arguments.seed}, faults=faults, **more)
    raise SystemExit(int(lost > 0))
