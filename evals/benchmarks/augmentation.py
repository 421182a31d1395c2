"""What generated images do to the likelihood of real ones: the demo's model trained on digits and generated digits.

    make demo
    python evals/benchmarks/augmentation.py --output evals/results/augmentation-cpu.json

The champion's 1,000 digits make up ``--share`` of every batch; all else, the number of images seen included, is as in
the demo. Test bits/dim of both models are compared image by image.
"""

import argparse
import math
import subprocess
import sys
from pathlib import Path
from statistics import fmean, stdev

from safetensors.numpy import load

from evals.benchmarks.measuring import Figure, write_results
from tarflow_scale.records import MetricsReport
from tarflow_scale.registry import Registry

DEMO = "runs/demo"
MODEL = "digits-augmented"


def report_of(model: str, reference: str) -> tuple[MetricsReport, dict[bytes, float]]:
    """The newest report with bits/dim, and those of each image by its digest."""
    registry = Registry(f"{DEMO}/registry", model)
    version = registry.resolve(reference)
    reports = [one for one in registry.state().reports[version.version] if "bits_per_dim" in one.metrics]
    per_image = reports[-1].metrics["bits_per_dim"].per_image
    assert per_image is not None
    arrays = load(registry.read("bits/dim of each image", per_image))
    pairs = zip(arrays["image_sha256"], arrays["bits_per_dim"], strict=True)
    return reports[-1], {image.tobytes(): float(bits) for image, bits in pairs}


def main() -> None:
    """Train, evaluate, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=0.25, help="of every batch that is generated")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    weight = arguments.share / (1 - arguments.share)
    mix = f"data.mix=[{{path: {DEMO}/generated, weight: {weight}}}]"
    where = [f"logging.path={DEMO}/train-augmented", f"registry.model={MODEL}"]
    subprocess.run(["launch/torchrun.sh", "2", "configs/train/digits.yaml", mix, *where], check=True)
    evaluate = [sys.executable, "-m", "tarflow_scale", "evaluate", "configs/evaluate/digits.yaml"]
    subprocess.run([*evaluate, f"registry.model={MODEL}"], check=True)
    plain, without = report_of("digits", "champion")
    augmented, with_generated = report_of(MODEL, "latest")
    differences = [with_generated[image] - bits for image, bits in without.items()]
    figures: dict[str, Figure] = {
        "bits_per_dim_without": ("", plain.metrics["bits_per_dim"].value, "bits/dim"),
        "bits_per_dim_with": ("", augmented.metrics["bits_per_dim"].value, "bits/dim"),
        "difference": ("", fmean(differences), "bits/dim"),
        "difference_standard_error": ("", stdev(differences) / math.sqrt(len(differences)), "bits/dim"),
        "frechet_pixels_without": ("", plain.metrics["frechet_pixels"].value, "levels of 4 bits, squared"),
        "frechet_pixels_with": ("", augmented.metrics["frechet_pixels"].value, "levels of 4 bits, squared"),
    }
    write_results(arguments.output, "cpu", figures, share=arguments.share, seeds={"training": 0})


if __name__ == "__main__":
    main()
