"""Cost of a registry: time to list a long log with and without its snapshot, and store requests of an event.

    python evals/benchmarks/registry.py --output evals/results/registry-cpu.json

A model gets 1,000 versions and 9,000 more events. Times are of a new process for ``models list``, start of Python
included, and of reading the state alone; the median of ``--rounds``.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evals.benchmarks.measuring import Figure, write_results
from tarflow_scale import storage
from tarflow_scale.config.sampling import SamplingConfig
from tarflow_scale.records import MetricsReport, MetricValue
from tarflow_scale.registry import Registry
from tarflow_scale.registry.log import new_event

FACTS: dict[str, Any] = {
    "pixels": {"bit_depth": 8, "noise": "uniform"},
    "data": {
        "name": "d", "split": "train", "digest": "0" * 64, "image_size_pixels": 64, "num_channels": 3,
        "class_names": [f"class {i}" for i in range(10)], "num_images": 10**6,
    },
    "parameters": 10**8, "images_seen": 10**8, "ema_half_life_images": 10**5, "config_digest": "c" * 64,
    "git_commit": "0" * 40, "packages": {f"package-{i}": "1.0.0" for i in range(10)},
}  # fmt: skip
MODEL = "m"


def fill(path: Path, versions: int, events: int) -> None:
    """Write a log: register versions, then evaluate and approve them in turn up to the given number of events."""
    digest = ""
    registry = Registry(str(path), MODEL)
    Path(registry.log.path).mkdir(parents=True)
    for number in range(1, events + 1):
        version = (number - 1) % versions + 1
        file = {"sha256": f"{version:064x}", "bytes": 10**9}
        if number <= versions:
            record = {"version": version, "files": {"model.safetensors": file, "config.json": file}, **FACTS}
            event = new_event(number, "register", str(number), "end of training", digest, {"version": record})
        elif number % 3:
            payload: dict[str, Any] = {"version": version, "user": f"user {number}"}
            event = new_event(number, "approve", str(number), "seen", digest, payload)
        else:
            value = MetricValue(
                value=3.0, unit="bits/dim", standard_error=0.01, num_images=50_000, protocol="p",
                protocol_digest="d" * 64, protocol_id="i" * 64,
            )  # fmt: skip
            report = MetricsReport(
                model=MODEL, version=version, weights_digest="w" * 64, metrics={"p": value, "q": value}, baselines={},
                sampling=SamplingConfig(), seconds=100.0, packages=FACTS["packages"],
            )  # fmt: skip
            payload = {"report": report.model_dump(mode="json")}
            event = new_event(number, "evaluate", str(number), "evaluated", digest, payload)
        content = event.to_json()
        Path(registry.log.location(number)).write_bytes(content)
        digest = storage.digest(content)


def seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def requests_of_an_event(path: Path) -> tuple[float, float]:
    """Store requests of an event in a process that knows the state, and in one that starts from the snapshot."""
    asked = [0]
    for name in ("read_bytes", "read_if_there", "exists", "create", "write_bytes", "list_names", "modified_seconds"):
        real: Callable[..., Any] = getattr(storage, name)

        def counted(*arguments: Any, _real: Callable[..., Any] = real) -> Any:
            asked[0] += 1
            return _real(*arguments)

        setattr(storage, name, counted)
    found: list[float] = []
    registry = Registry(str(path), MODEL)
    for one in (registry, registry):
        before = asked[0]
        one.append("approve", "counted", lambda state: {"version": 1, "user": f"user {state.number}"})
        found.append(float(asked[0] - before))
    return found[1], found[0]


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", type=int, default=1000)
    parser.add_argument("--events", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        fill(path, arguments.versions, arguments.events)
        snapshot = path / MODEL / "_snapshot"
        command = [sys.executable, "-m", "tarflow_scale", "models", "list", f"registry.path={path}"]
        times: dict[str, list[float]] = {key: [] for key in ("cold list", "cold", "warm list", "warm")}
        for _ in range(arguments.rounds):
            for kind in ("cold", "warm"):
                if kind == "cold":
                    snapshot.unlink(missing_ok=True)
                times[f"{kind} list"].append(seconds(lambda: subprocess.run(command, check=True, capture_output=True)))
                if kind == "cold":
                    snapshot.unlink()
                times[kind].append(seconds(lambda: Registry(str(path), MODEL).state()))
        median = {key: statistics.median(several) for key, several in times.items()}
        known, fresh = requests_of_an_event(path)
    figures: dict[str, Figure] = {
        "cold_list": ("<= 2", median["cold list"], "s"),
        "cold_state": ("", median["cold"], "s"),
        "list_with_snapshot": ("", median["warm list"], "s"),
        "state_with_snapshot": ("<= 0.3", median["warm"], "s"),
        "requests_of_an_event": ("", known, "requests"),
        "requests_of_the_first_event_of_a_process": ("", fresh, "requests"),
    }
    counts = {key: getattr(arguments, key) for key in ("versions", "events")}
    write_results(arguments.output, "cpu", figures, counts=counts, rounds=arguments.rounds)


if __name__ == "__main__":
    main()
