"""A picture of what `interpolated` and `edited` do: images between two, and images moved towards another class.

    make demo
    python evals/benchmarks/latents_picture.py --registry runs/demo/registry --model digits --data runs/demo/data \
        --output evals/results/latents-digits.png

The upper rows go from one test image to another, the first of its class each, on an arc in latent space. Below the
gap, the first test images of a class move along the mean latent of the training images of another class less that of
their own; strength 1 adds the difference once. Labels are dropped throughout, so that only latents move.
"""

import argparse
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tarflow_scale.config.protocols import BitsPerDimProtocol
from tarflow_scale.density import attribute_direction, edited, interpolated
from tarflow_scale.flows import Flow
from tarflow_scale.loading import load_version
from tarflow_scale.metrics.bits import dequantized_draws
from tarflow_scale.shards.images import contact_sheet
from tarflow_scale.shards.reader import ShardSet

_COLUMNS = 11
_ZOOM = 5


def images_of_classes(path: str, num_classes: int) -> list[Tensor]:
    """Dequantised images ``(B, C, H, W)`` of every class, in the order of the data set."""
    shards = ShardSet(path)
    protocol = BitsPerDimProtocol(name="p", metric="bits_per_dim", bit_depth=shards.manifest.bit_depth, num_draws=1)
    batches = list(shards.batches(0, shards.manifest.num_images, 256))
    images = torch.cat([x for batch in batches for x in dequantized_draws(batch, protocol)])
    labels = torch.cat([torch.from_numpy(batch.labels) for batch in batches])
    return [images[labels == label] for label in range(num_classes)]


def rows_between(flow: Flow, test: list[Tensor], classes: list[int]) -> list[Tensor]:
    """A row for each class and the next: from its first image to the other's."""
    return [interpolated(flow, test[a][0], test[b][0], _COLUMNS) for a, b in pairwise(classes)]


def rows_edited(
    flow: Flow, test: list[Tensor], train: list[Tensor], way: list[int], num: int, strength: float
) -> list[Tensor]:
    """A row for each of the first images of a class, moved towards another by 0 to ``strength``."""
    start, end = way
    direction = attribute_direction(flow, train[end], train[start])
    x = test[start][:num]
    moved = [edited(flow, x, direction, float(s)) for s in np.linspace(0, strength, _COLUMNS)]
    return list(torch.stack(moved, dim=1))


@torch.no_grad()
def main() -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--registry", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--version", default="champion")
    parser.add_argument("--data", required=True, help="folder of the splits train and test")
    parser.add_argument("--classes", type=int, nargs="+", default=[0, 6, 5, 9, 7], help="of the ends, in a chain")
    parser.add_argument("--edits", nargs="+", default=["1-7", "3-9", "3-8"], help="FROM-TO, classes of each edit")
    parser.add_argument("--rows", type=int, default=2, help="images of each edit")
    parser.add_argument("--strength", type=float, default=1.5, help="of the last column")
    parser.add_argument("--output", type=Path, required=True, help="PNG file to write")
    arguments = parser.parse_args()
    flow = load_version(arguments.registry, arguments.model, arguments.version)
    if flow.num_classes is None:
        raise SystemExit(f"{arguments.model}@{arguments.version} must have classes (got none); name another model")
    train, test = (images_of_classes(f"{arguments.data}/{split}", flow.num_classes) for split in ("train", "test"))
    ways = [[int(label) for label in edit.split("-")] for edit in arguments.edits]
    between = rows_between(flow, test, arguments.classes)
    moved = [row for way in ways for row in rows_edited(flow, test, train, way, arguments.rows, arguments.strength)]
    upper, lower = (flow.stored(torch.cat(rows)).numpy() for rows in (between, moved))
    gap = np.full_like(upper[:_COLUMNS], 255)
    arguments.output.write_bytes(contact_sheet(np.concatenate([upper, gap, lower]), _COLUMNS, _ZOOM))


if __name__ == "__main__":
    main()
