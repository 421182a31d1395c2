"""Effect of variational dequantization on bits/dim: one recipe with uniform and with variational dequantization.

    python evals/benchmarks/dequantization.py --output evals/results/dequantization-cpu.json

RealNVP on the digits, with its recipe except for the number of images; both runs see the same images with the same
uniform noise, and are evaluated by the same protocol, so bits/dim are compared image by image.
"""

import argparse
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load as load_arrays

from evals.benchmarks.measuring import Figure, write_results
from tarflow_scale.registry import Registry

RECIPE = "configs/train/digits-realnvp.yaml"
VARIANTS = {"uniform": [], "learned": ["model.dequantization={couplings: 2, width: 16}"]}


def run(*command: str) -> None:
    print("\n$", "tarflow-scale", *command, flush=True)
    subprocess.run([sys.executable, "-m", "tarflow_scale", *command], check=True)


def costs(registry: str, model: str) -> NDArray[np.float64]:
    """Bits/dim of each test image, in an order that is the same for all models."""
    metric = Registry(registry, model).state().reports[1][-1].metrics["bits_per_dim"]
    assert metric.per_image is not None
    arrays = load_arrays(Registry(registry, model).read("costs", metric.per_image))
    order = sorted(range(len(arrays["image_sha256"])), key=lambda i: arrays["image_sha256"][i].tobytes())
    return arrays["bits_per_dim"][order].astype(np.float64)


def main() -> None:
    """Train, evaluate, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=112_000, help="that each run sees; the recipe's by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    figures: dict[str, Figure] = {}
    found: dict[str, NDArray[np.float64]] = {}
    with tempfile.TemporaryDirectory() as folder:
        run("prepare", "configs/prepare/digits.yaml", f"shards.path={folder}/data")
        for name, settings in VARIANTS.items():
            where = [f"registry.path={folder}/registry", f"registry.model={name}"]
            length = [f"training.total_images={arguments.images}", f"training.seed={arguments.seed}"]
            run(
                "train",
                RECIPE,
                f"data.path={folder}/data/train",
                f"logging.path={folder}/{name}",
                *where,
                *length,
                *settings,
            )
            run(
                *("evaluate", "configs/evaluate/digits.yaml", *where, "sampling.guidance.scale=0"),
                *(f"data.path={folder}/data/test", f"reference.path={folder}/data/train"),
                *(f"reference.cache={folder}/references", "cluster.executor=local"),
                "metrics.protocols=[evals/protocols/digits-bits-per-dim.yaml]",
            )
            found[name] = costs(f"{folder}/registry", name)
            figures[f"{name}_bits_per_dim"] = ("", float(found[name].mean()), "bits/dim")
            version = Registry(f"{folder}/registry", name).resolve("latest")
            figures[f"{name}_parameters"] = ("", float(version.parameters), "")
    difference = found["learned"] - found["uniform"]
    figures["difference"] = ("", float(difference.mean()), "bits/dim, image by image")
    error = float(difference.std(ddof=1) / math.sqrt(len(difference)))
    figures["difference_standard_error"] = ("", error, "bits/dim")
    facts = {"recipe": RECIPE, "variants": VARIANTS, "images_seen": arguments.images, "test_images": len(difference)}
    write_results(arguments.output, "cpu", figures, seeds={"training": arguments.seed, "protocol": 0}, **facts)


if __name__ == "__main__":
    main()
