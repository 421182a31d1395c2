"""Anomaly scores in Python: a threshold from held-out images, flagged images, and pixels with low likelihood.

    make demo
    python launch/examples/anomaly.py                                        # test digits, damaged ones, a bar
    python launch/examples/anomaly.py --images my/digits                     # also a folder of your own images

For whole data sets use the verb: tarflow-scale score configs/score/digits.yaml.

A known failure: a flow may assign a higher likelihood to simple images of another kind than to its training images
(Nalisnick et al., arXiv 1810.09136), so `likelihood` alone must not decide. A plain bar shows this here.
"""

# %% Arguments: the model, the data, the output folder
import argparse
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tarflow_scale import load
from tarflow_scale.config.prepare import SourceConfig
from tarflow_scale.density import image_bits_per_dim, image_nats
from tarflow_scale.density.anomaly import compressed_bits_per_dim, scores_of, threshold
from tarflow_scale.density.surprise import overlaid
from tarflow_scale.errors import UserError
from tarflow_scale.shards.images import contact_sheet
from tarflow_scale.shards.reader import ShardSet
from tarflow_scale.shards.sources import open_source

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--registry", default="runs/demo/registry", help="folder or URL")
parser.add_argument("--model", default="digits@champion", help="MODEL@VERSION or MODEL@ALIAS")
parser.add_argument("--data", default="runs/demo/data/test", help="a packed split that the model was not trained on")
parser.add_argument("--images", help="folder of your own images to score")
parser.add_argument("--rate", type=float, default=0.05, help="share of normal images that may be flagged")
parser.add_argument("--output", type=Path, default=Path("runs/examples"), help="folder for the picture")
arguments = parser.parse_args([] if "ipykernel" in sys.modules else None)
try:
    flow = load(arguments.model, registry=arguments.registry)
    held_out = ShardSet(arguments.data)
except UserError as error:  # one line and exit code 2, as on the command line
    print(f"{error}; 'make demo' creates the default inputs of this example", file=sys.stderr)
    raise SystemExit(2) from None
arguments.output.mkdir(parents=True, exist_ok=True)
bit_depth = flow.pixels.bit_depth if flow.pixels else 8

# %% Images (B, C, H, W) uint8: one half of the held-out images sets the threshold, the other half is the normal set
images = held_out.take(np.arange(held_out.manifest.num_images)).events
half = len(images) // 2
shuffled = (
    np.random.default_rng(0)
    .permuted(images[half:].reshape(len(images) - half, -1), axis=1)
    .reshape(images[half:].shape)
)
bar = np.zeros_like(images[:1])
bar[..., bar.shape[-1] // 2 - 1 : bar.shape[-1] // 2 + 1] = 255
sets = {"normal": images[half:], "shuffled pixels": shuffled, "a bar": bar}
if arguments.images:
    shape = {"resize": "center_crop", "size_pixels": flow.event_shape[1:], "bit_depth": bit_depth}
    source = open_source(SourceConfig.model_validate({"kind": "folder", "path": arguments.images} | shape))
    sets[arguments.images] = np.stack([source.image(i) for i in range(len(source))])


# %% Scores, higher for more anomalous images, with dropped labels; the share `rate` of held-out images is above a limit
def scored(levels: NDArray[np.uint8], typical: float | None = None) -> dict[str, NDArray[np.float64]]:
    """All scores; ``typical`` is the mean bits/dim of normal images."""
    bits = image_bits_per_dim(flow, levels, num_draws=4, estimate="importance")
    return scores_of(bits, compressed_bits_per_dim(levels >> (8 - bit_depth)), typical or float(bits.mean()), None)


calibration = scored(images[:half])
typical = float(calibration["likelihood"].mean())
limits = {score: threshold(values, arguments.rate) for score, values in calibration.items()}
print("flagged images of".ljust(20), *(score.rjust(12) for score in limits))
scores = {name: scored(levels, typical) for name, levels in sets.items()}
for name, values in scores.items():
    print(name[-20:].ljust(20), *(f"{(values[score] > limit).mean():12.1%}" for score, limit in limits.items()))
less_likely = (scores["normal"]["likelihood"] > scores["a bar"]["likelihood"][0]).mean()
print(f"{less_likely:.0%} of the normal images are less likely than the bar")

# %% The least likely images, each beside a copy with its nats in red
if flow.divides_surprise:
    name = arguments.images or "normal"
    shown = sets[name][np.argsort(-scores[name]["likelihood"])[:16]]
    rgb = np.broadcast_to(shown, (len(shown), 3, *shown.shape[2:]))
    pairs = np.stack([rgb, overlaid(shown, image_nats(flow, shown, num_draws=4))], axis=1)
    (arguments.output / "surprise.png").write_bytes(contact_sheet(pairs.reshape(-1, *rgb.shape[1:]), 8, zoom=8))
    print(f"{arguments.output / 'surprise.png'}: {len(shown)} images, and their pixels of low likelihood in red")
