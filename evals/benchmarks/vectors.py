"""Density estimation in two dimensions: every flow for vectors on two moons, with the whole pipeline.

    python evals/benchmarks/vectors.py --output evals/results/vectors-cpu.json

Points are scikit-learn's `make_moons`; a held-out split of 2,000 points is evaluated in nats, without labels. A picture
of the density of the first flow is written beside the JSON file.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from sklearn.datasets import make_moons

from evals.benchmarks.measuring import Figure, write_results
from tarflow_scale.registry import Registry

NUM_TRAIN, NUM_TEST, NOISE = 20_000, 2_000, 0.08
MODELS = {
    "maf": "{kind: maf, transforms: 5, hidden_widths: [64, 64], class_conditional: false}",
    "iaf": "{kind: iaf, transforms: 5, hidden_widths: [64, 64], class_conditional: false}",
    "nice": "{kind: nice, couplings: 6, width: 128, hidden_layers: 2, class_conditional: false}",
    "realnvp": "{kind: realnvp, levels: 2, width: 64, residual_blocks: 1, class_conditional: false}",
    "continuous": "{kind: continuous, width: 64, hidden_layers: 2, solver: rk4, num_steps: 6, "
    "class_conditional: false}",
}


def run(*command: str) -> None:
    print("\n$", "tarflow-scale", *command, flush=True)
    subprocess.run([sys.executable, "-m", "tarflow_scale", *command], check=True)


def main() -> None:
    """Prepare, train, evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=400_000, help="points that each flow sees in training")
    parser.add_argument("--only", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    figures: dict[str, Figure] = {}
    with tempfile.TemporaryDirectory() as folder:
        x, _ = make_moons(NUM_TRAIN + NUM_TEST, noise=NOISE, random_state=0)
        np.savez(f"{folder}/moons.npz", x=x[:NUM_TRAIN], x_test=x[NUM_TRAIN:])
        data = f"{folder}/data"
        run("prepare", "configs/prepare/vectors.yaml", f"source.path={folder}/moons.npz", f"shards.path={data}")
        for name in arguments.only:
            where = [f"registry.path={folder}/registry", f"registry.model={name}"]
            train = [f"data.path={data}/train", f"model={MODELS[name]}", f"logging.path={folder}/{name}", *where]
            run("train", "configs/train/vectors.yaml", *train, f"training.total_images={arguments.images}")
            sets = [f"data.path={data}/test", f"reference.path={data}/train", f"reference.cache={folder}/references"]
            run("evaluate", "configs/evaluate/vectors.yaml", *sets, *where)
            report = Registry(f"{folder}/registry", name).state().reports[1][-1]
            nats = report.metrics["nats"]
            assert nats.standard_error is not None
            figures[f"{name}_nats"] = ("", nats.value, "nats")
            figures[f"{name}_nats_standard_error"] = ("", nats.standard_error, "nats")
            figures["gaussian_nats"] = ("", report.baselines["gaussian_nats"], "nats")
        if arguments.output:
            newest = max((Path(folder) / arguments.only[0] / "previews").glob("*.png"))
            shutil.copyfile(newest, arguments.output.with_suffix(".png"))
    facts = {"models": MODELS, "points": {"train": NUM_TRAIN, "test": NUM_TEST, "noise": NOISE}}
    write_results(arguments.output, "cpu", figures, images_seen=arguments.images, seeds={"data": 0, "run": 0}, **facts)


if __name__ == "__main__":
    main()
