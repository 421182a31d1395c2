"""Fault injection for Slurm jobs, on a real Slurm cluster of two nodes on this machine.

    python evals/benchmarks/slurm_faults.py --output evals/results/slurm-cpu.json

The scripts in `launch/slurm` are submitted as users do it. A small TarFlow trains on the digits with a rank on each
node; log and weights must equal those of an undisturbed run to the last bit. A generation on Ray must give the same
files as one process, byte for byte. Nodes are network namespaces (`slurm_cluster`).
"""

import re
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evals.benchmarks import faults
from evals.benchmarks.fault_running import Failed, finish, run_scenarios, start
from evals.benchmarks.generation_faults import content, same
from evals.benchmarks.slurm_cluster import Cluster, slurm

__all__ = ["SCENARIOS", "World", "make_world"]

TOP = Path(__file__).resolve().parents[2]
IMAGES = 9600
LOGGED = 20
"""Lines of a run's log after which something happens to it."""
LIMIT_SECONDS = 1500.0
TOLD = re.compile(
    r"^\S+ job \d+ |stopped by SIG|\*\*\* .*(CANCELLED|NODE)|registered \S+@|images in \d+ shard|^tarflow-scale: error"
)
"""Lines of a job's log that are its story."""


@dataclass
class World:
    """A cluster, and undisturbed runs."""

    cluster: Cluster
    training: faults.World
    folder: Path
    num_images: int
    """Of a generation."""
    notes: dict[str, Any] = field(default_factory=lambda: {"transcripts": {}})
    """Slurm's version, and what jobs said of their starts, stops and ends."""

    def train(self, run: Path, *options: str, images: int = IMAGES) -> int:
        """Submit a training run; the number of its job, whose log is ``<run>.out``."""
        words = [*options, f"--output={run}.out", "--nodes=2", "launch/slurm/train.sbatch"]
        return self.cluster.submit(*words, *self.arguments(run, images), cwd=TOP)

    def arguments(self, run: Path, images: int = IMAGES) -> list[str]:
        """Of a training run."""
        return self.training.config(run, training__total_images=images, logging__every_images=320)

    def expected(self, images: int = IMAGES) -> Path:
        """The run to compare with, on two ranks of one machine; made once."""
        run = self.folder / f"expected-{images}/run"
        if not (run / "model").exists():
            finish(start(self.arguments(run, images), 2))
        return run

    def generation(self, output: Path) -> list[str]:
        """Arguments of a generation by the model of `expected`."""
        return [
            str(TOP / "configs/generate/digits.yaml"),
            f"registry.path={self.expected()}-registry",
            "registry.model=faults",
            "registry.version=latest",
            f"sampling.num_images={self.num_images}",
            "sampling.batch_size=50",
            f"shards.path={output}",
            "shards.samples_per_shard=200",
        ]

    def reach(self, job: int, run: Path, lines: int = LOGGED) -> None:
        """Wait until a run has logged so many lines."""
        self.until(lambda: (run / "log.jsonl").exists() and _lines(run / "log.jsonl") >= lines, job, run)

    def until(self, happened: Callable[[], bool], job: int, run: Path) -> None:
        """Wait for a condition while a job runs."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while not happened():
            state = self.cluster.job(job)["JobState"]
            if state not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING") or time.monotonic() > deadline:
                raise Failed(f"job {job} is {state}:\n{_text(run)}")
            time.sleep(0.1)

    def comes_back(self, job: int, run: Path) -> None:
        """The job must wait in the queue again, and then complete."""
        self.cluster.at_once(job, LIMIT_SECONDS)
        if (state := self.cluster.wait(job, LIMIT_SECONDS)) != "COMPLETED":
            raise Failed(f"job {job} is {state}:\n{_text(run)}")
        starts = re.findall(r" job \d+ on \S+, start (\d+)", _text(run))
        if starts != ["1", "2"]:
            raise Failed(f"starts of the job: {starts}")

    def take_nodes(self, folder: Path) -> None:
        """Run a short job with higher priority on all nodes; wait until it has ended."""
        words = [
            "--partition=high",
            "--nodes=2",
            "--exclusive",
            f"--output={folder}/urgent.out",
            "--wrap=srun hostname",
        ]
        if (state := self.cluster.wait(self.cluster.submit(*words), LIMIT_SECONDS)) != "COMPLETED":
            raise Failed(f"the urgent job is {state}")


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n")


def _text(run: Path) -> str:
    log = run.with_suffix(".out")
    return log.read_text(errors="replace") if log.exists() else ""


def make_world(cluster: Cluster, folder: Path, num_images: int = 20_000) -> World:
    """Pack the data."""
    return World(cluster, faults.make_world(folder), folder, num_images)


def a_more_urgent_job(world: World, folder: Path) -> None:
    """A training run is preempted by a partition of higher priority, goes back to the queue and continues."""
    run = folder / "run"
    job = world.train(run)
    world.reach(job, run)
    world.take_nodes(folder)
    world.comes_back(job, run)
    if "stopped by SIGTERM" not in _text(run):
        raise Failed(f"the ranks did not save:\n{_text(run)}")
    faults.check_equal(run, world.expected())


def the_time_limit(world: World, folder: Path) -> None:
    """Slurm signals a training run shortly before its time limit; the run goes back to the queue and continues."""
    run, images = folder / "run", 8 * IMAGES  # Slurm counts in minutes
    job = world.train(run, "--time=2", "--signal=USR1@60", images=images)
    world.until(lambda: "stopped by SIGUSR1" in _text(run), job, run)
    world.cluster.wait(job, LIMIT_SECONDS, until=("PENDING",))
    world.cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=30")
    world.comes_back(job, run)
    faults.check_equal(run, world.expected(images))


def a_node_fails(world: World, folder: Path) -> None:
    """All processes of a node die during training; the node comes back, and the run continues from its checkpoint."""
    run = folder / "run"
    job = world.train(run)
    world.reach(job, run)
    node = world.cluster.nodes[-1]
    world.cluster.kill_node(node)
    world.cluster.wait_until_down(node)
    world.cluster.start_node(node)
    world.comes_back(job, run)
    faults.check_equal(run, world.expected())


def a_mistake(world: World, folder: Path) -> None:
    """A wrong setting ends a job with exit code 2 and one line; the job is not retried."""
    words = [f"--output={folder}/run.out", "--nodes=2", "launch/slurm/train.sbatch", "configs/train/digits.yaml"]
    job = world.cluster.submit(*words, "optimizer.lr=1", cwd=TOP)
    state, code = world.cluster.wait(job, LIMIT_SECONDS), world.cluster.job(job)["ExitCode"]
    errors = [line for line in _text(folder / "run").splitlines() if line.startswith("tarflow-scale")]
    wanted = ["tarflow-scale: error: optimizer.lr: unknown key; check the spelling against --help"]
    if (state, code, errors) != ("FAILED", "2:0", wanted) or "Traceback" in _text(folder / "run"):
        raise Failed(f"{state}, {code}:\n{_text(folder / 'run')}")


def an_array(world: World, folder: Path) -> None:
    """An array of two jobs trains the runs in the lines of a file, one after the other on both nodes."""
    runs = [folder / "one", folder / "two"]
    lines = [" ".join([*world.arguments(run), "'training.total_images=640'"]) for run in runs]
    (folder / "runs.txt").write_text("\n".join(lines) + "\n")
    words = [f"--output={folder}/%a.out", "--nodes=2", "launch/slurm/train.sbatch", f"{folder}/runs.txt"]
    job = world.cluster.submit("--array=1-2", *words, cwd=TOP)
    for number, run in enumerate(runs, 1):
        state = world.cluster.wait(f"{job}_{number}", LIMIT_SECONDS)
        if state != "COMPLETED" or not (run / "model/model.safetensors").exists():
            raise Failed(f"job {number} of the array is {state}:\n{_text(folder / str(number))}")
    faults.check_equal(*runs)


def ray_on_all_nodes(world: World, folder: Path) -> None:
    """A generation on Ray workers of both nodes is preempted, and generates the missing shards when it continues."""
    output, plain = folder / "generated", world.folder / "generated"
    if not plain.exists():
        finish(start([*world.generation(plain), "cluster.executor=local"], 0, verb="generate"))
    words = [f"--output={folder}/run.out", "--nodes=2", "launch/slurm/ray.sbatch", "generate"]
    job = world.cluster.submit(*words, *world.generation(output), cwd=TOP)
    world.until(lambda: len(list(output.glob("*.tar"))) >= 3, job, folder / "run")
    world.take_nodes(folder)
    world.comes_back(job, folder / "run")
    same(content(output), content(plain))
    for name in world.cluster.nodes:
        if left := world.cluster.work_on(name):
            raise Failed(f"processes of the job are left on {name}: {left}")


def remember(world: World, name: str, folder: Path) -> None:
    """Record the history of the jobs of a scenario in the notes."""
    logs = [log.read_text(errors="replace") for log in sorted(folder.glob("*.out")) if log.stem != "urgent"]
    lines = [line.replace(f"{folder}/", "").replace(f"{TOP}/", "") for log in logs for line in log.splitlines()]
    shown = [re.sub(r", start (\d+): .*", r", start \1", line) for line in lines if TOLD.search(line)]
    world.notes["transcripts"][name] = list(dict.fromkeys(shown))
    world.notes["scheduler"] = world.cluster.run("scontrol", "--version").strip()


SCENARIOS: list[Callable[[World, Path], None]] = [
    a_more_urgent_job, the_time_limit, a_node_fails, a_mistake, an_array, ray_on_all_nodes,
]  # fmt: skip


if __name__ == "__main__":
    place = Path(tempfile.mkdtemp(prefix="slurm"))
    try:
        with slurm(place) as own:
            run_scenarios(__doc__, SCENARIOS, lambda folder: make_world(own, folder), remember)
    finally:
        shutil.rmtree(place)
