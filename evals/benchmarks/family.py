"""Compare all flows on one data set, trained on the same number of images.

    python evals/benchmarks/family.py --output evals/results/family-cpu.json

Every model is trained by its recipe on two ranks, registered, and evaluated by the same protocols, without guidance;
then sampling is timed in this process, in batches of 100, the median of three. Finished work is not repeated. With
``--only`` the rows of the other flows in the file are kept; each row records when and where it was measured.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from evals.benchmarks.measuring import Figure, device_name, write_results
from tarflow_scale.config.sampling import SamplingConfig
from tarflow_scale.loading import load_version
from tarflow_scale.records import MetricsReport
from tarflow_scale.registry import Registry
from tarflow_scale.runtime import provenance
from tarflow_scale.runtime.cores import num_cores
from tarflow_scale.sampling import Sampler

FOLDER = Path("runs/family")
REGISTRY = str(FOLDER / "registry")
RECIPES = {
    "nice": "digits-nice", "realnvp": "digits-realnvp", "maf": "digits-maf", "iaf": "digits-iaf",
    "glow": "digits-glow", "continuous": "digits-continuous", "tarflow": "digits",
}  # fmt: skip
BATCH, TIMED_ROUNDS = 100, 3
UNIFORM_BITS_PER_DIM = 4.0
"""Of 4-bit images whose levels are all as likely."""


def run(*command: str) -> None:
    print("\n$", *command, flush=True)
    subprocess.run(command, check=True)


def train_and_evaluate(name: str, recipe: str) -> None:
    where = [f"logging.path={FOLDER / name}", f"registry.path={REGISTRY}", f"registry.model={name}"]
    run("launch/torchrun.sh", "2", f"configs/train/{recipe}.yaml", *where)
    registry = Registry(REGISTRY, name)
    if registry.resolve("latest").version in registry.state().reports:
        return
    unguided = ["sampling.guidance.scale=0", f"registry.path={REGISTRY}", f"registry.model={name}"]
    verb = [sys.executable, "-m", "tarflow_scale", "evaluate"]
    run(*verb, "configs/evaluate/digits.yaml", f"reference.cache={FOLDER}/references", *unguided)


def newest_report(name: str) -> MetricsReport:
    registry = Registry(REGISTRY, name)
    return registry.state().reports[registry.resolve("latest").version][-1]


def sampled_per_second(name: str) -> float:
    """Images a second, on all cores, after a batch that is not timed."""
    flow = load_version(REGISTRY, name, Registry(REGISTRY, name).resolve("latest").version)
    torch.set_num_threads(num_cores())
    sampler = Sampler(flow, 0, SamplingConfig(batch_size=BATCH))
    seconds: list[float] = []
    for number in range(TIMED_ROUNDS + 1):
        started = time.perf_counter()
        sampler.images(range(number * BATCH, (number + 1) * BATCH))
        seconds.append(time.perf_counter() - started)
    return BATCH / statistics.median(seconds[1:])


def trained_per_second(name: str) -> float:
    """Median of the log's lines, both ranks together."""
    lines = (FOLDER / name / "log.jsonl").read_text().splitlines()
    return statistics.median(json.loads(line)["images_per_second"] for line in lines)


def figures_of(name: str) -> dict[str, Figure]:
    report = newest_report(name)
    version = Registry(REGISTRY, name).resolve("latest")
    bits, distance = report.metrics["bits_per_dim"], report.metrics["frechet_pixels"]
    assert bits.standard_error is not None
    assert distance.standard_error is not None
    return {
        f"{name}_bits_per_dim": ("", bits.value, "bits/dim"),
        f"{name}_bits_per_dim_standard_error": ("", bits.standard_error, "bits/dim"),
        f"{name}_frechet_pixels": ("", distance.value, distance.unit),
        f"{name}_frechet_pixels_standard_error": ("", distance.standard_error, distance.unit),
        f"{name}_parameters": ("", float(version.parameters), ""),
        f"{name}_trained_per_second": ("", trained_per_second(name), "images/s"),
        f"{name}_sampled_per_second": ("", sampled_per_second(name), "images/s"),
    }


def main() -> None:
    """Train, evaluate, time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=RECIPES, help="models; default: all")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    names = arguments.only or list(RECIPES)
    run(sys.executable, "-m", "tarflow_scale", "prepare", "configs/prepare/digits.yaml")
    for name in names:
        train_and_evaluate(name, RECIPES[name])
    figures: dict[str, Figure] = {}
    for name in names:
        figures |= figures_of(name)
    report = newest_report(names[-1])
    figures |= {
        "gaussian_bits_per_dim": ("", report.baselines["gaussian_bits_per_dim"], "bits/dim"),
        "gaussian_frechet_pixels": ("", report.baselines["gaussian_frechet_pixels"], "levels of 4 bits, squared"),
        "uniform_bits_per_dim": ("", UNIFORM_BITS_PER_DIM, "bits/dim"),
    }
    before = json.loads(arguments.output.read_bytes()) if arguments.output and arguments.output.exists() else {}
    kept = {name: one for name, one in before.get("figures", {}).items() if name.partition("_")[0] not in names}
    figures = {name: (one["asked"], one["got"], one["unit"]) for name, one in kept.items()} | figures
    where = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "git_commit": provenance.git_commit(),
        "device": device_name("cpu"),
    }
    earlier = {name: {key: before[key] for key in where} for name in before.get("models", ())}
    seen = {name: Registry(REGISTRY, name).resolve("latest").images_seen for name in names}
    facts: dict[str, Any] = {
        "models": list(RECIPES) if before else names,
        "measured": earlier | before.get("measured", {}) | dict.fromkeys(names, where),
        "images_seen": before.get("images_seen", {}) | seen,
        "protocol_ids": {name: metric.protocol_id for name, metric in report.metrics.items()},
        "seeds": {"training": 0, "protocols": 0},
    }
    write_results(arguments.output, "cpu", figures, **facts)


if __name__ == "__main__":
    main()
