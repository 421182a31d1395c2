"""AUROC of every anomaly score: how well it separates test images from several kinds of anomalies.

    make demo
    python evals/benchmarks/anomaly.py digits --registry runs/demo/registry --model digits --data runs/demo/data \
        --photos PHOTOS --output evals/results/anomaly-digits-cpu.json
    python evals/benchmarks/anomaly.py mnist --registry runs/mnist/registry --model mnist-glow --data data/mnist \
        --output evals/results/anomaly-mnist-glow-cpu.json

Half of the test split calibrates the scores, the other half is the normal set. Anomalies are made from that half:
pixels shuffled, patches shuffled, rotated by 90 degrees, inverted; and from crops of photographs (a folder of images)
reduced to the format of the data. For digits a background model is trained: a MAF on digits with every fourth pixel
replaced by a random one.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from evals.benchmarks.measuring import Figure, write_results
from tarflow_scale.shards.images import reduce_depth
from tarflow_scale.shards.manifest import Manifest, read_manifest
from tarflow_scale.shards.reader import ShardSet
from tarflow_scale.shards.writer import PackedShard, Sample, publish_manifest

Images = NDArray[np.uint8]
_BACKGROUND = "background"
_RANDOM_SHARE = 0.25


def read(path: Path) -> tuple[Images, NDArray[np.int64]]:
    """All images ``(B, C, H, W)`` and labels of a data set."""
    shards = ShardSet(str(path))
    batch = next(shards.batches(0, shards.manifest.num_images, shards.manifest.num_images))
    return batch.events, batch.labels


def pack(images: Images, labels: NDArray[np.int64] | None, like: Manifest, path: Path) -> Path:
    """A data set of the same format, with classes where there are labels."""
    samples = (
        Sample(f"{i:06d}", image, None if labels is None else int(labels[i]))
        for i, image in enumerate(np.ascontiguousarray(images))
    )
    record = PackedShard.of("a.tar", samples).write(str(path))
    classes = () if labels is None else like.class_names
    changes = {"name": path.name, "split": "test", "shards": (record,), "class_names": classes}
    publish_manifest(str(path), Manifest.model_validate(like.model_dump() | changes))
    return path


def shuffled_pixels(images: Images, random: np.random.Generator) -> Images:
    return random.permuted(images.reshape(*images.shape[:2], -1), axis=2).reshape(images.shape)


def shuffled_patches(images: Images, random: np.random.Generator) -> Images:
    """Quarters of quarters: a grid of 4 x 4 patches in another order."""
    num, channels, height, width = images.shape
    h, w = height // 4, width // 4
    patches = images.reshape(num, channels, 4, h, 4, w).transpose(0, 2, 4, 1, 3, 5).reshape(num, 16, channels, h, w)
    order = random.permuted(np.tile(np.arange(16), (num, 1)), axis=1)
    patches = np.take_along_axis(patches, order[:, :, None, None, None], axis=1)
    return patches.reshape(num, 4, 4, channels, h, w).transpose(0, 3, 1, 4, 2, 5).reshape(images.shape)


def rotated(images: Images, random: np.random.Generator) -> Images:
    del random
    return np.rot90(images, axes=(2, 3))


def inverted(images: Images, random: np.random.Generator) -> Images:
    del random
    return 255 - images


ANOMALIES: dict[str, dict[str, Callable[[Images, np.random.Generator], Images]]] = {
    "digits": {"shuffled_pixels": shuffled_pixels, "rotated": rotated},
    "mnist": {"inverted": inverted, "shuffled_patches": shuffled_patches},
}


def crops(folder: Path, num: int, like: Manifest, random: np.random.Generator) -> Images:
    """Random grey crops of photographs, half a photograph wide, shrunk to the format of the data."""
    photos = [Image.open(path).convert("L") for path in sorted(folder.glob("*.png"))]
    assert photos, f"no PNG in {folder}"
    (_, height, width), found = like.event.carried_shape, list[Images]()
    for number in range(num):
        photo = photos[number % len(photos)]
        side = min(photo.size) // 2
        left, top = (int(random.integers(0, length - side + 1)) for length in photo.size)
        small = photo.crop((left, top, left + side, top + side)).resize((width, height), Image.Resampling.LANCZOS)
        found.append(reduce_depth(np.asarray(small)[None], like.bit_depth))
    return np.stack(found)


def train_background(train: Path, folder: Path, random: np.random.Generator) -> str:
    """A model of noisier data, registered; returns the registry."""
    images, labels = read(train)
    like = read_manifest(str(train))
    noise = reduce_depth(random.integers(0, 256, images.shape, dtype=np.uint8), like.bit_depth)
    noisy = np.where(random.random(images.shape) < _RANDOM_SHARE, noise, images)
    data = pack(noisy, labels, like, folder / "noisy")
    registry = str(folder / "registry")
    more = [f"data.path={data}", f"logging.path={folder}/run", f"registry.path={registry}"]
    command = ["launch/torchrun.sh", "2", "configs/train/digits-maf.yaml", *more, f"registry.model={_BACKGROUND}"]
    subprocess.run(command, check=True)
    return registry


def main() -> None:
    """Make the sets, score, collect."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=ANOMALIES)
    parser.add_argument("--registry", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True, help="the folder with train and test")
    parser.add_argument("--photos", type=Path, help="a folder of PNG photographs, of which crops are anomalies too")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    random = np.random.default_rng(0)
    images, labels = read(arguments.data / "test")
    like = read_manifest(str(arguments.data / "test"))
    figures: dict[str, Figure] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        calibration = pack(images[0::2], labels[0::2], like, folder / "calibration")
        normal = pack(images[1::2], labels[1::2], like, folder / "normal")
        made = {kind: change(images[1::2], random) for kind, change in ANOMALIES[arguments.kind].items()}
        if arguments.photos is not None:
            made["photo_crops"] = crops(arguments.photos, len(images[1::2]), like, random)
        background: list[str] = []
        if arguments.kind == "digits":
            registry = train_background(arguments.data / "train", folder, random)
            background = [f"background.path={registry}", f"background.model={_BACKGROUND}"]
        for kind, several in made.items():
            anomalies, out = pack(several, None, like, folder / kind), folder / f"scores-{kind}"
            where = [f"registry.path={arguments.registry}", f"registry.model={arguments.model}", *background]
            where += [f"data.path={normal}", f"calibration.path={calibration}", f"anomalies.path={anomalies}"]
            verb = [sys.executable, "-m", "tarflow_scale", "score", *where]
            subprocess.run([*verb, f"scoring.path={out}", "registry.version=champion"], check=True)
            found = json.loads((out / "summary.json").read_text())["scores"]
            aurocs = {score: facts["auroc"] for score, facts in found.items()}
            for score, facts in found.items():
                for what in ("auroc", "aupr", "false_positive_rate_95"):
                    figures[f"{kind}_{score}_{what}"] = ("", facts[what], what)
            asked = ">= 0.95" if kind in ("photo_crops", "inverted") else ""
            figures[f"{kind}_best_auroc"] = (asked, max(aurocs.values()), "auroc of the score that does best here")
    facts = {"data": arguments.kind, "model": f"{arguments.model}@champion", "images": len(images[1::2])}
    write_results(
        arguments.output, "cpu", figures, **facts, seeds={"anomalies": 0}, direction="higher is more anomalous"
    )


if __name__ == "__main__":
    main()
