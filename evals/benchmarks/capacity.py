"""Predictions of the verb ``plan`` against measurements: peak memory, bytes between ranks, seconds of a step.

    python evals/benchmarks/capacity.py --output evals/results/capacity-cpu.json

Every case is a new process, or two ranks over gloo in their own network namespace if that is allowed, so that no other
traffic is counted. Each rank has one thread.

* Memory: peak resident memory in a step, minus the resident memory before the flow was built, after all imports and two
  steps of a tiny flow. glibc returns freed blocks at once (`measuring`), so resident memory is memory in use;
  ``retained`` is the addition of its default settings in one case. Predicted by `memory_of`, for ranks without GPUs.
* Bytes: received on the loopback in a step. Predicted by `traffic_of`, for all ranks.
* Seconds: the fastest step. Two fp32 cases with different batches determine utilisation and the time of the optimizer
  update, one bf16 case determines the utilisation in bf16; all other cases are predicted from these and from the rate
  at which gloo sums 200 MB, without overlap. Other programs use the machine too, so errors of times are reported
  without a bound.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from evals.benchmarks.measuring import EXACT_MEMORY, Figure, peak_bytes, reset_peak, resident_bytes, write_results
from tarflow_scale.capacity.activations import activation_footprint
from tarflow_scale.capacity.flops import training_flops
from tarflow_scale.capacity.memory import Ranks, memory_of
from tarflow_scale.capacity.steps import RECOMPUTING, traffic_of
from tarflow_scale.config.model import GlowConfig, ModelConfig, TarFlowConfig
from tarflow_scale.config.parallelism import ParallelismConfig
from tarflow_scale.config.train import OptimizerConfig, TrainingConfig
from tarflow_scale.flows import build
from tarflow_scale.runtime import distributed
from tarflow_scale.runtime.processes import leave
from tarflow_scale.training.ema import WeightAverages
from tarflow_scale.training.engine import Engine, start_process_group
from tarflow_scale.training.objective import FlowObjective
from tarflow_scale.training.zero import model_size

SHAPE = (3, 32, 32)
MODELS: dict[str, ModelConfig] = {
    "tarflow51m": TarFlowConfig(patch_size=2, width=512, layers_per_block=(4, 4, 4, 4), class_conditional=False),
    "tarflow114m": TarFlowConfig(patch_size=4, width=768, layers_per_block=(4, 4, 4, 4), class_conditional=False),
    "glow22m": GlowConfig(levels=3, steps_per_level=16, width=512, class_conditional=False),
    "tiny": TarFlowConfig(patch_size=4, width=64, layers_per_block=(1, 1), class_conditional=False),
    "tiny_glow": GlowConfig(levels=2, steps_per_level=2, width=16, class_conditional=False),
}
PLAIN: dict[str, Any] = {
    "stage": 0,
    "precision": "fp32",
    "activations": "keep",
    "batch": 4,
    "accumulated": 1,
    "optimizer": "adamw",
}
CASES: dict[str, dict[str, Any]] = {
    "tarflow_keep": {"model": "tarflow51m", "ranks": 1},
    "tarflow_keep_one_image": {"model": "tarflow51m", "ranks": 1, "batch": 1},
    "tarflow_keep_bf16": {"model": "tarflow51m", "ranks": 1, "precision": "bf16"},
    "tarflow_checkpoint": {"model": "tarflow51m", "ranks": 1, "activations": "checkpoint"},
    "tarflow_checkpoint_bf16": {"model": "tarflow51m", "ranks": 1, "activations": "checkpoint", "precision": "bf16"},
    "glow_keep": {"model": "glow22m", "ranks": 1, "batch": 8},
    "glow_checkpoint": {"model": "glow22m", "ranks": 1, "batch": 8, "activations": "checkpoint"},
    "glow_rebuild": {"model": "glow22m", "ranks": 1, "batch": 8, "activations": "rebuild"},
    "tarflow_stage0": {"model": "tarflow51m", "ranks": 2, "batch": 2},
    "tarflow_stage1_accumulating": {"model": "tarflow51m", "ranks": 2, "stage": 1, "batch": 1, "accumulated": 2},
    "tarflow_stage2_muon": {"model": "tarflow51m", "ranks": 2, "stage": 2, "batch": 2, "optimizer": "muon"},
    "large_stage2": {"model": "tarflow114m", "ranks": 2, "stage": 2, "batch": 2},
    "large_stage2_bf16": {"model": "tarflow114m", "ranks": 2, "stage": 2, "batch": 2, "precision": "bf16"},
    "large_stage2_accumulating": {"model": "tarflow114m", "ranks": 2, "stage": 2, "batch": 2, "accumulated": 2},
    "large_stage3": {"model": "tarflow114m", "ranks": 2, "stage": 3, "batch": 2},
}
ANCHORS = {"fp32": "tarflow_keep", "bf16": "tarflow_keep_bf16"}
FEWER = "tarflow_keep_one_image"
"""As the fp32 anchor, with fewer images."""
SUMMED_NUMBERS = 50_000_000
STEPS = 2
_MB = 1e6


def parallelism_of(case: dict[str, Any]) -> ParallelismConfig:
    """The section of a case."""
    chosen = {"zero_stage": case["stage"], "precision": case["precision"], "activations": case["activations"]}
    return ParallelismConfig.model_validate(chosen)


class Trainee:
    """A flow of a case in training."""

    def __init__(self, model: ModelConfig, case: dict[str, Any], device: torch.device) -> None:
        torch.manual_seed(0)
        flow = build(model, SHAPE).train()
        x = torch.rand(case["batch"], *SHAPE) * 2 - 1
        flow.initialize(x[:1])
        flow.activations = case["activations"]
        batch = case["batch"] * case["accumulated"] * distributed.world_size()
        training = TrainingConfig(total_images=1, global_batch_size=batch, micro_batch_size=case["batch"])
        muon = {"kind": "muon", "muon_peak_lr": 1e-3} if case["optimizer"] == "muon" else {}
        optimizer = OptimizerConfig.model_validate(muon)
        objective = FlowObjective(flow, conditional=False, label_drop=0.0)
        self.engine = Engine(objective, device, optimizer, training, parallelism_of(case))
        self.averages = WeightAverages(self.engine, (1000,))
        self.batches = [(x, None)] * case["accumulated"]

    def step(self) -> None:
        """A step and the average after it."""
        self.engine.step(self.batches, 1.0)
        self.averages.update(10**6, 8)


def worker(name: str, output: Path) -> None:
    """Measure a case; rank 0 writes it."""
    case = PLAIN | CASES[name]
    device = start_process_group(threads=1)
    tiny = Trainee(MODELS["tiny_glow" if case["model"].startswith("glow") else "tiny"], case, device)
    for _ in range(2):
        tiny.step()
    before = resident_bytes("cpu")
    trainee = Trainee(MODELS[case["model"]], case, device)
    trainee.step()
    found: dict[str, float] = {"seconds": float("inf"), "peak": 0.0, "bytes": 0.0}
    for _ in range(STEPS):
        distributed.barrier()
        reset_peak("cpu")
        received, started = loopback_bytes(), time.perf_counter()
        trainee.step()
        found["seconds"] = min(found["seconds"], time.perf_counter() - started)
        distributed.barrier()
        found["bytes"] = float(loopback_bytes() - received)
        found["peak"] = float(peak_bytes("cpu") - before)
    found["sum_seconds"] = summing() if distributed.world_size() > 1 else 0.0
    if distributed.is_main():
        output.write_text(json.dumps(found), encoding="utf-8")
    distributed.barrier()
    leave(0)


def summing() -> float:
    """Seconds in which gloo sums `SUMMED_NUMBERS`."""
    numbers, best = torch.ones(SUMMED_NUMBERS), float("inf")
    for _ in range(3):
        started = time.perf_counter()
        dist.all_reduce(numbers)
        best = min(best, time.perf_counter() - started)
    return best


def loopback_bytes() -> int:
    """Bytes that the loopback has received."""
    for line in Path("/proc/net/dev").read_text(encoding="utf-8").splitlines():
        if line.strip().startswith("lo:"):
            return int(line.partition(":")[2].split()[0])
    raise RuntimeError("no loopback in /proc/net/dev")


def isolated() -> bool:
    """Whether a network namespace can be made here."""
    return (
        subprocess.run(["unshare", "-n", "ip", "link", "set", "lo", "up"], capture_output=True, check=False).returncode
        == 0
    )


def measured(name: str, alone: bool, environment: dict[str, str]) -> dict[str, float]:
    """A case in processes of its own."""
    with tempfile.TemporaryDirectory() as folder:
        output = f"{folder}/found.json"
        ranks = str((PLAIN | CASES[name])["ranks"])
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
        command = [*launch, __file__, "--worker", name, output]
        if alone:
            command = ["unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *command]
        settings = os.environ | {"OMP_NUM_THREADS": "1"} | environment
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=settings)
        if done.returncode or not Path(output).exists():
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
        found = json.loads(Path(output).read_text(encoding="utf-8"))
    print(f"{name}: {found}", file=sys.stderr, flush=True)
    return found


def predicted(name: str, flops: float, bytes_per_second: float, update: float) -> dict[str, float]:
    """Predictions for a case.

    Args:
        name: of the case.
        flops: operations a second of a rank, activations kept.
        bytes_per_second: that a rank sends.
        update: seconds of the optimizer for a parameter, which the planner leaves out for GPUs.
    """
    case = PLAIN | CASES[name]
    model, parallelism, ranks = MODELS[case["model"]], parallelism_of(case), case["ranks"]
    with torch.device("meta"):
        size = model_size(build(model, SHAPE))
    footprint = activation_footprint(model, SHAPE, case["batch"], case["activations"], bf16=case["precision"] == "bf16")
    memory = memory_of(size, footprint, parallelism, 1, Ranks(ranks, case["accumulated"] > 1, cuda=False))
    sent = traffic_of(size, parallelism, ranks, case["accumulated"], cuda=False).total
    rate = flops * (1.0 if case["activations"] == "keep" else RECOMPUTING)
    compute = case["batch"] * case["accumulated"] * training_flops(model, SHAPE) / rate
    own = size.parameters / (1 if case["stage"] == 0 else ranks)
    return {
        "peak": memory.total,
        "bytes": sent * ranks,
        "seconds": compute + sent / bytes_per_second + own * update,
    }


def rates_of(found: dict[str, dict[str, float]]) -> tuple[dict[str, float], float]:
    """Operations a second by precision, and seconds of an update for a parameter."""
    case = PLAIN | CASES[ANCHORS["fp32"]]
    flops, model = training_flops(MODELS[case["model"]], SHAPE), MODELS[case["model"]]
    more, fewer = found[ANCHORS["fp32"]]["seconds"], found[FEWER]["seconds"]
    of_image = (more - fewer) / (case["batch"] - 1)
    update = max(fewer - of_image, 0.0)
    with torch.device("meta"):
        parameters = model_size(build(model, SHAPE)).parameters
    rates = {one: case["batch"] * flops / (found[name]["seconds"] - update) for one, name in ANCHORS.items()}
    return rates, update / parameters


def main() -> None:
    """Measure all cases, or one as a worker."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--worker", nargs=2, metavar=("CASE", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker[0], Path(arguments.worker[1]))
        return
    torch.set_num_threads(1)
    alone = isolated()
    found = {name: measured(name, alone, EXACT_MEMORY) for name in CASES}
    retained = measured(ANCHORS["fp32"], alone, {})
    rates, update = rates_of(found)
    gloo = 4.0 * SUMMED_NUMBERS / min(one["sum_seconds"] for one in found.values() if one["sum_seconds"])
    figures: dict[str, Figure] = {}
    for name, got in found.items():
        precision = (PLAIN | CASES[name])["precision"]
        expected = predicted(name, rates[precision], gloo, update)
        figures[f"{name}_memory"] = ("0.85 to 1.15", expected["peak"] / got["peak"], "predicted over measured")
        figures[f"{name}_memory_measured"] = ("", got["peak"] / _MB, "MB a rank")
        if got["sum_seconds"]:
            figures[f"{name}_bytes"] = ("0.95 to 1.05", expected["bytes"] / got["bytes"], "predicted over measured")
        if name not in (*ANCHORS.values(), FEWER):
            figures[f"{name}_seconds"] = ("", expected["seconds"] / got["seconds"], "predicted over measured")
        figures[f"{name}_seconds_measured"] = ("", got["seconds"], "s")
    figures["allocator_retention"] = ("", retained["peak"] / found[ANCHORS["fp32"]]["peak"], "times, glibc's defaults")
    figures["update"] = ("", update * 1e9, "ns a parameter")
    figures["gloo_sum"] = ("", gloo / _MB, "MB/s sent by a rank")
    figures |= {f"{precision}_rate": ("", rate / 1e9, "GFLOP/s of a thread") for precision, rate in rates.items()}
    sizes = {"cases": CASES, "else": PLAIN, "steps": STEPS, "image": list(SHAPE)}
    write_results(arguments.output, "cpu", figures, sizes=sizes, seeds={"weights": 0}, own_network_namespace=alone)


if __name__ == "__main__":
    main()
