"""Bayes classification by a class-conditional flow that was trained for likelihood alone: accuracy on a test split.

    make demo
    python evals/benchmarks/classification.py --registry runs/demo/registry --model digits --data runs/demo/data/test \
        --output evals/results/classification-digits-cpu.json

The predicted label has the largest likelihood, the mean density over dequantization draws.
"""

import argparse
import math
from pathlib import Path

import torch

from evals.benchmarks.measuring import Figure, write_results
from tarflow_scale.config.protocols import BitsPerDimProtocol
from tarflow_scale.density import log_prob_of_labels
from tarflow_scale.loading import load_version
from tarflow_scale.metrics.bits import dequantized_draws
from tarflow_scale.shards.reader import ShardSet


@torch.no_grad()
def main() -> None:
    """Classify every image."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--registry", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--version", default="champion")
    parser.add_argument("--data", required=True, help="the split to classify")
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    flow = load_version(arguments.registry, arguments.model, arguments.version)
    shards = ShardSet(arguments.data)
    protocol = BitsPerDimProtocol(
        name="p", metric="bits_per_dim", bit_depth=shards.manifest.bit_depth, num_draws=arguments.draws
    )
    right = num = 0
    for batch in shards.batches(0, shards.manifest.num_images, 256):
        found = torch.stack([log_prob_of_labels(flow, x) for x in dequantized_draws(batch, protocol)])
        labels = torch.logsumexp(found.double(), dim=0).argmax(dim=1)
        right += int((labels == torch.from_numpy(batch.labels)).sum())
        num += len(batch)
    accuracy = right / num
    figures: dict[str, Figure] = {
        "accuracy": (">= 0.95", accuracy, f"of {num} images"),
        "accuracy_standard_error": ("", math.sqrt(accuracy * (1 - accuracy) / num), f"of {num} images"),
    }
    facts = {"model": f"{arguments.model}@{arguments.version}", "draws": arguments.draws}
    write_results(arguments.output, "cpu", figures, **facts)


if __name__ == "__main__":
    main()
