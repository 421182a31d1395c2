"""Sampling in Python: classes, guidance, temperature, interpolation, and bits/dim of your own images.

    make demo
    python launch/examples/sampling.py                       # the demo's champion, pictures in runs/examples
    python launch/examples/sampling.py --images my/digits    # bits/dim of your own images instead of test digits

It also runs cell by cell, in VS Code or (with Jupytext) in Jupyter.
"""

# %% Arguments: the model, the data, the output folder
import argparse
import sys
from pathlib import Path

import numpy as np
import torch

from tarflow_scale import load
from tarflow_scale.config.prepare import SourceConfig
from tarflow_scale.density import image_bits_per_dim, image_tensor, interpolated
from tarflow_scale.errors import UserError
from tarflow_scale.shards.images import contact_sheet
from tarflow_scale.shards.reader import ShardSet
from tarflow_scale.shards.sources import open_source

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--registry", default="runs/demo/registry", help="folder or URL")
parser.add_argument("--model", default="digits@champion", help="MODEL@VERSION (number, alias or 'latest')")
parser.add_argument("--data", default="runs/demo/data/test", help="a packed split of real images, for interpolation")
parser.add_argument("--images", help="folder of your own images; default: the images of --data")
parser.add_argument("--guidance", type=float, default=1.0)
parser.add_argument("--output", type=Path, default=Path("runs/examples"), help="folder for the pictures")
arguments = parser.parse_args([] if "ipykernel" in sys.modules else None)


def save(x: torch.Tensor, columns: int, name: str) -> None:
    """Write a picture of samples ``(B, C, H, W)``, enlarged five times."""
    (arguments.output / name).write_bytes(contact_sheet(flow.stored(x).numpy(), columns, zoom=5))
    print(f"{arguments.output / name}: {len(x)} images, {columns} per row")


# %% The model and real images
try:
    flow = load(arguments.model, registry=arguments.registry)
    test = ShardSet(arguments.data)
except UserError as error:  # one line and exit code 2, as on the command line
    print(f"{error}; 'make demo' creates the default inputs of this example", file=sys.stderr)
    raise SystemExit(2) from None
arguments.output.mkdir(parents=True, exist_ok=True)
if flow.num_classes is None or not flow.capabilities.guidance:
    raise SystemExit(f"this example needs classes and guidance (got {type(flow).__name__}); choose another --model")

# %% Classes: column c shows class c. Sample i depends on (weights, seed, i) and its label, not on the number of samples
labels = torch.arange(flow.num_classes).repeat(8)
x = flow.sample(len(labels), labels, guidance=arguments.guidance, seed=0, progress=True)
save(x, flow.num_classes, "classes.png")

# %% Temperature, the standard deviation of the latent: a row for each; lower ones give more likely samples
one_each = torch.arange(flow.num_classes)
temperatures = (0.5, 0.7, 0.85, 1.0, 1.1)
rows = [flow.sample(len(one_each), one_each, temperature=t, seed=0, progress=True) for t in temperatures]
save(torch.cat(rows), flow.num_classes, "temperatures.png")

# %% Interpolation: rows go from one real image to another, on an arc in latent space, with dropped labels
batch = test.take(np.arange(min(200, test.manifest.num_images)))
x = image_tensor(flow, batch.events[:10])
save(torch.cat([interpolated(flow, x[2 * i], x[2 * i + 1], 11) for i in range(5)]), 11, "between.png")

# %% Bits/dim. With labels, they equal those of `evaluate` for the same images; your own images have no labels
assert flow.pixels is not None
images, given = batch.events, torch.from_numpy(batch.labels) if test.manifest.num_classes else None
if arguments.images:
    shape = {"resize": "center_crop", "size_pixels": flow.event_shape[1:], "bit_depth": flow.pixels.bit_depth}
    source = open_source(SourceConfig.model_validate({"kind": "folder", "path": arguments.images} | shape))
    images, given = np.stack([source.image(i) for i in range(len(source))]), None
bits = image_bits_per_dim(flow, images, given, num_draws=8)
print(f"bits/dim of {len(bits)} images: {bits.mean():.4f}, from {bits.min():.4f} to {bits.max():.4f}")
