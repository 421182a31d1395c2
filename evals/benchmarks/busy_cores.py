"""Speed of a training step of one rank with and without another program on one of its cores.

    python evals/benchmarks/busy_cores.py --output evals/results/busy-cores-cpu.json

Recipes are measured one after the other, on random images. Three processes have the same flow: one with a single
thread, one with a thread for each core and OpenMP's default waiting, and one with the settings of a rank
(`tarflow_scale.runtime.cores.spin_briefly`). They take turns of a second in varying order, in rounds without and with a
load: a process pinned to the last core that computes without pause. Figures are medians over rounds of the ratio of two
turns of the same round.

As root, the script shields its processes from other programs: by real-time scheduling in rounds without the load, and
by the highest priority of its scheduling group in rounds with it, where load and training have equal priority. The
results record this, and the load of the machine at the start and the end.
"""

import argparse
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from evals.benchmarks.measuring import Figure, write_results
from tarflow_scale.config.model import FlowConfig
from tarflow_scale.config.train import TrainConfig
from tarflow_scale.flows import build, standard_normal_log_prob
from tarflow_scale.runtime.cores import num_cores, spin_briefly

RECIPES = {"digits": ((1, 8, 8), 10), "folder": ((3, 32, 32), 2)}
"""Shape of images, and number of classes, by name of a recipe in ``configs/train``."""
WARM_UP = 2
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")


@dataclass(frozen=True)
class Variant:
    """A worker process: its number of threads, and the environment variables for their waiting."""

    threads: int
    environment: dict[str, str]


def work(threads: int, recipe: str) -> None:
    """Train on request: reads a number of seconds from a line of standard input, prints images per second."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = TrainConfig.load(Path(__file__).parents[2] / f"configs/train/{recipe}.yaml", [])
    shape, classes = RECIPES[recipe]
    batch = config.training.micro_batch_size
    assert isinstance(config.model, FlowConfig)
    flow = build(config.model, shape, classes).train()
    x, y = torch.rand(batch, *shape) * 2 - 1, torch.arange(batch) % classes
    flow.initialize(x, y)
    optimizer = torch.optim.AdamW(flow.parameters(), lr=1e-4)

    def step() -> None:
        z, log_det = flow(x, y)
        optimizer.zero_grad()
        (-(standard_normal_log_prob(z) + log_det).mean() / flow.num_dims).backward()
        optimizer.step()

    for _ in range(WARM_UP):
        step()
    print("ready", flush=True)
    for line in sys.stdin:
        seconds, steps, started = float(line), 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            step()
            steps += 1
        print(batch * steps / (time.perf_counter() - started), flush=True)


def started(variant: Variant, recipe: str) -> "subprocess.Popen[str]":
    """A worker that is ready."""
    kept = {name: value for name, value in os.environ.items() if name not in WAITING}
    worker = subprocess.Popen(
        [sys.executable, __file__, "--worker", str(variant.threads), recipe],
        env=kept | variant.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert worker.stdout is not None
    if worker.stdout.readline() != "ready\n":
        raise SystemExit("a worker did not start; see what it said")
    return worker


def turn(worker: "subprocess.Popen[str]", seconds: float, real_time: bool) -> float:
    """Images per second of one turn; all threads get the same scheduling."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    for thread in Path(f"/proc/{worker.pid}/task").iterdir():
        schedule(int(thread.name), real_time)
    worker.stdin.write(f"{seconds}\n")
    worker.stdin.flush()
    return float(worker.stdout.readline())


def schedule(thread: int, real_time: bool) -> None:
    """Real-time or ordinary."""
    if shielded():
        policy = os.SCHED_FIFO if real_time else os.SCHED_OTHER
        os.sched_setscheduler(thread, policy, os.sched_param(1 if real_time else 0))


def shielded() -> bool:
    """Whether this process may set priorities."""
    return os.geteuid() == 0


def measure(variants: dict[str, Variant], recipe: str, rounds: int, seconds: float) -> dict[str, list[list[float]]]:
    """Images per second of every variant in rounds without the load, and in rounds with it."""
    workers = {name: started(variant, recipe) for name, variant in variants.items()}
    load = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    os.sched_setaffinity(load.pid, {max(os.sched_getaffinity(0))})
    found: dict[str, list[list[float]]] = {name: [[], []] for name in variants}
    try:
        for number in range(rounds):
            for busy in (False, True):
                load.send_signal(signal.SIGCONT if busy else signal.SIGSTOP)
                for name in random.Random(2 * number + busy).sample([*workers], len(workers)):
                    found[name][busy].append(turn(workers[name], seconds, real_time=not busy))
                said = ", ".join(f"{name} {values[busy][-1]:.0f}" for name, values in found.items())
                print(f"{recipe} round {number + 1} {'busy' if busy else 'quiet'}: {said}", file=sys.stderr)
    finally:
        for process in (load, *workers.values()):
            process.kill()
            process.wait()
    return found


def ratio(found: dict[str, list[list[float]]], busy: bool, these: str, those: str) -> float:
    """Median over rounds."""
    return statistics.median(a / b for a, b in zip(found[these][busy], found[those][busy], strict=True))


def figures_of(found: dict[str, list[list[float]]], name: str) -> dict[str, Figure]:
    """Ratios, and the speeds that they come from."""
    figures: dict[str, Figure] = {
        f"{name}_busy_default_over_one_thread": ("", ratio(found, True, "default", "one thread"), "times"),
        f"{name}_busy_ours_over_default": ("> 2", ratio(found, True, "ours", "default"), "times"),
        f"{name}_busy_ours_over_one_thread": (">= 1", ratio(found, True, "ours", "one thread"), "times"),
        f"{name}_quiet_ours_over_default": (">= 0.95", ratio(found, False, "ours", "default"), "times"),
        f"{name}_quiet_ours_over_one_thread": ("", ratio(found, False, "ours", "one thread"), "times"),
    }
    for variant, values in found.items():
        for busy, word in enumerate(("quiet", "busy")):
            key = f"{name}_{word}_{re.sub(r'[^a-z0-9]+', '_', variant.lower())}"
            figures[key] = ("", statistics.median(values[busy]), "images/s")
    return figures


def waiting_of_ranks() -> dict[str, str]:
    """What `spin_briefly` sets where nothing is set."""
    before = {name: value for name in WAITING if (value := os.environ.pop(name, None)) is not None}
    spin_briefly()
    chosen = {name: os.environ.pop(name) for name in WAITING if name in os.environ}
    os.environ.update(before)
    return chosen


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, or be a worker."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="of each kind")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a turn")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=[*RECIPES], help="to measure")
    parser.add_argument("--try", dest="tried", nargs="*", default=[], metavar="VARIABLE=VALUE", help="more variants")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--worker", nargs=2, metavar=("THREADS", "RECIPE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.worker:
        work(int(arguments.worker[0]), arguments.worker[1])
        return
    if num_cores() < 2:
        raise SystemExit("threads that wait for each other need two cores (got 1); run it on a larger machine")
    if shielded():
        if os.getsid(0) != os.getpid():
            os.setsid()  # a scheduling group of its own
        Path("/proc/self/autogroup").write_text("-20", encoding="utf-8")
    settings = waiting_of_ranks()
    variants = {
        "one thread": Variant(1, {}),
        "default": Variant(num_cores(), {}),
        "ours": Variant(num_cores(), settings),
    }
    variants |= {word: Variant(num_cores(), dict([word.split("=", 1)])) for word in arguments.tried}
    before = Path("/proc/loadavg").read_text(encoding="utf-8").split()[0]
    figures: dict[str, Figure] = {}
    for recipe in arguments.recipes:
        found = measure(variants, recipe, arguments.rounds, arguments.seconds)
        figures |= figures_of(found, recipe.replace("-", "_"))
    after = Path("/proc/loadavg").read_text(encoding="utf-8").split()[0]
    shield = "shielded by priority" if shielded() else "not shielded"
    machine = f"other programs ran (load average {before} before, {after} after); {shield}"
    facts = {"cores": num_cores(), "rounds": arguments.rounds, "seed": 0, "settings": settings, "machine": machine}
    write_results(arguments.output, "cpu", figures, **facts)


if __name__ == "__main__":
    main()
