"""What evaluation costs: extraction against torch-fidelity's own loop, workers, merging, and memory of the driver.

python evals/benchmarks/evaluation.py [--registry runs/demo/registry --data runs/demo/data] [--output FILE]

Inception has random weights, which take as long as the published ones. Both loops extract the same images in the same
batches and take turns; the median of ``--rounds`` turns counts. Workers are timed on an extractor-bound job from the
first part that any has done, because the start of Ray does not grow with the job; of several workers the first parts of
all are left out, though some end later, so the ratio is a lower bound. With ``--registry`` the memory of the
driver is that of ``evaluate`` for the digits of the demo, at two numbers of samples; their features are so small that
this would show images or copies of the model, not features that are kept.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from measuring import Figure, write_results
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.utils import create_feature_extractor, get_featuresdict_from_dataset

from tarflow_scale import storage
from tarflow_scale.config import DataSetConfig, PrepareConfig, ReferenceConfig, SamplingConfig
from tarflow_scale.metrics.features import open_extractor
from tarflow_scale.metrics.frechet import Moments
from tarflow_scale.metrics.store import FeatureSet, Images
from tarflow_scale.pool import Pool
from tarflow_scale.prepare import run as prepare
from tarflow_scale.scoring import Scorer, Unit

INCEPTION = "inception-v3-compat"
BATCH = 32


class Pictures(torch.utils.data.Dataset[torch.Tensor]):
    """Random images in memory."""

    def __init__(self, images: torch.Tensor) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self._images[index]


def random_inception(path: Path) -> Path:
    """Weights as they are initialised."""

    class Unloaded(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_: Any, **__: Any) -> Any:
            torch.save(self.state_dict(), path)

    torch.save({}, path)
    Unloaded(INCEPTION, ["2048"], feature_extractor_weights_path=str(path))
    return path


def feature_set(weights: Path, folder: str, num: int) -> FeatureSet:
    return FeatureSet(Images("reference", num, 0, 4, "floor"), INCEPTION, storage.digest(weights), ("pool",), folder)


def against_torch_fidelity(weights: Path, num: int, rounds: int) -> dict[str, Figure]:
    """Images a second of both loops, and what merging adds to ours."""
    images = torch.randint(0, 256, (num, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ours = open_extractor(feature_set(weights, "", num), {INCEPTION: str(weights)}, torch.device("cpu"))
    path = str(weights)
    theirs = create_feature_extractor(
        INCEPTION, ["2048"], cuda=False, verbose=False, feature_extractor_weights_path=path
    )
    seconds: dict[str, list[float]] = {"ours": [], "theirs": [], "merging": []}
    for number in range(rounds + 1):
        started = time.perf_counter()
        rows = torch.cat([ours(few)["pool"] for few in images.split(BATCH)])
        extracted = time.perf_counter()
        part = Moments.of(rows)
        part.merge(part)
        merged = time.perf_counter()
        found = get_featuresdict_from_dataset(Pictures(images), theirs, BATCH, False, True, False)["2048"]
        finished = time.perf_counter()
        assert torch.allclose(found, rows, rtol=1e-4, atol=1e-5)
        if number:
            seconds["ours"].append(extracted - started)
            seconds["merging"].append(merged - extracted)
            seconds["theirs"].append(finished - merged)
        print(f"round {number}: ours {extracted - started:.2f} s, theirs {finished - merged:.2f} s", file=sys.stderr)
    median = {name: statistics.median(several) for name, several in seconds.items()}
    return {
        "extraction_over_torch_fidelity": (">= 1", median["theirs"] / median["ours"], "times"),
        "extraction": ("", num / median["ours"], "images/s"),
        "merging_over_extraction": ("<= 0.02", median["merging"] / median["ours"], "of it"),
    }


def two_workers_over_one(weights: Path, folder: Path, num: int) -> dict[str, Figure]:
    """Speed of two workers over that of one, on parts of an extractor-bound job."""
    source = {"source": {"kind": "digits"}, "shards": {"path": str(folder / "digits")}}
    prepare(PrepareConfig.model_validate(source), dry_run=False)
    data = str(folder / "digits/train")
    arguments = {
        "registry": None,
        "version": 0,
        "data": DataSetConfig(path=data),
        "reference": ReferenceConfig(path=data, cache=str(folder)),
        "sampling": SamplingConfig(batch_size=BATCH),
        "extractor_weights": {INCEPTION: str(weights)},
        "threads": 1,
        "gpu": False,
    }
    rates: list[float] = []
    for workers in (1, 2):
        features = feature_set(weights, str(folder / str(workers)), num)
        units = [Unit(part, features) for part in features.parts()]
        with Pool("ray", num_workers=workers) as pool:
            times = [time.perf_counter() for _ in pool.run(Scorer, arguments, units)]
        timed = len(units) - workers  # the first of each worker waits for the start
        rates.append(timed / (times[-1] - times[0]))  # what is left of other first parts counts against several
        print(f"{workers} workers: {rates[-1]:.3g} parts/s", file=sys.stderr)
    return {"two_workers_over_one": (">= 1.6", rates[1] / rates[0], "times")}


def driver_memory(registry: str, data: str, folder: Path, small: int, large: int) -> dict[str, Figure]:
    """Peak memory of the driver at a small and at a large number of samples."""
    peaks: list[float] = []
    for num in (small, large):
        protocol = folder / f"{num}.yaml"
        facts = {"name": f"n{num}", "metric": "frechet", "extractor": "pixels", "bit_depth": 4, "num_images": num}
        protocol.write_text(yaml.safe_dump(facts), encoding="utf-8")
        overrides = [
            f"registry.path={registry}", "registry.model=digits", f"data.path={data}/test",
            f"reference.path={data}/train", f"reference.cache={folder}", "metrics.baselines=false",
            f"metrics.protocols=[{protocol}]",
        ]  # fmt: skip
        code = (
            "import resource, sys; from tarflow_scale.cli import main; code = main(sys.argv[1:]); "
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(code)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, "evaluate", *overrides], capture_output=True, text=True, check=True
        )
        peaks.append(int(done.stdout.splitlines()[-1]) / 1024)
    return {
        "driver_peak_memory": ("", peaks[1], "MiB"),
        f"driver_memory_{large}_samples_over_{small}": ("", peaks[1] / peaks[0], "times"),
    }


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=128, help="a turn of either loop")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", type=int, default=4, help="of the job that one and two workers do; 250 images each")
    parser.add_argument("--registry", help="of the demo; its evaluations are added to it")
    parser.add_argument("--data", default="runs/demo/data")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = random_inception(folder / "weights.pth")
        figures = against_torch_fidelity(weights, arguments.images, arguments.rounds)
        figures |= two_workers_over_one(weights, folder, 250 * arguments.parts)
        if arguments.registry:
            figures |= driver_memory(arguments.registry, arguments.data, folder, 1000, 10_000)
    if arguments.output:
        facts = {key: getattr(arguments, key) for key in ("images", "rounds", "parts")}
        write_results(arguments.output, "cpu", figures, **facts)
    else:
        for key, (asked, got, unit) in figures.items():
            print(f"{key}: {got:.4g} {unit} (asked: {asked or 'no'})")


if __name__ == "__main__":
    main()
