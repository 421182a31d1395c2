"""Cost of evaluation: extraction against torch-fidelity's loop, scaling with workers, merging, memory of the driver.

python evals/benchmarks/evaluation.py [--registry runs/demo/registry --data runs/demo/data] [--output FILE]

Inception has random weights, which take as long as the published ones. Both loops extract the same images in the same
batches and take turns in varying order; the result is the median of ``--rounds`` turns. The time of workers on an
extractor-bound job starts when the first part is done, because the start of Ray does not grow with the job. With
several workers the first part of each is left out, so the ratio is a lower bound. The results of one and of two workers
are compared.

The memory of the driver is measured at two numbers of samples: for the distance of random features as wide as
Inception's, from parts on disk, on two workers, with ten instead of 50 jackknife blocks (each is a decomposition of
2048 x 2048 on a worker); and with ``--registry`` also for a whole ``evaluate`` of the demo's digits.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.utils import create_feature_extractor, get_featuresdict_from_dataset

from evals.benchmarks.measuring import Figure, write_results
from tarflow_scale import storage
from tarflow_scale.config.data import DataSetConfig
from tarflow_scale.config.evaluate import ReferenceConfig
from tarflow_scale.config.prepare import PrepareConfig
from tarflow_scale.config.sampling import SamplingConfig
from tarflow_scale.metrics.features import open_extractor
from tarflow_scale.metrics.frechet import Moments
from tarflow_scale.metrics.parts import FeatureSet, Images, write_arrays
from tarflow_scale.pool import Pool
from tarflow_scale.verbs.evaluate.worker import EvaluationUnit, Scorer
from tarflow_scale.verbs.prepare.driver import run as prepare

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
    """Images per second of both loops, and the cost of merging in ours."""
    images = torch.randint(0, 256, (num, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ours = open_extractor(feature_set(weights, "", num), {INCEPTION: str(weights)}, torch.device("cpu"))
    path = str(weights)
    theirs = create_feature_extractor(
        INCEPTION, ["2048"], cuda=False, verbose=False, feature_extractor_weights_path=path
    )

    def merge(rows: torch.Tensor) -> None:
        part = Moments.of(rows)
        part.merge(part)

    seconds: dict[str, list[float]] = {"ours": [], "theirs": [], "merging": []}
    loops = {
        "ours": lambda: torch.cat([ours(few)["pool"] for few in images.split(BATCH)]),
        "theirs": lambda: get_featuresdict_from_dataset(Pictures(images), theirs, BATCH, False, True, False)["2048"],
    }
    rows: dict[str, torch.Tensor] = {}
    for number in range(rounds + 1):
        for name in sorted(loops, reverse=bool(number % 2)):
            started = time.perf_counter()
            rows[name] = loops[name]()
            seconds[name].append(time.perf_counter() - started)
        started = time.perf_counter()
        merge(rows["ours"])
        seconds["merging"].append(time.perf_counter() - started)
        print(f"round {number}: " + ", ".join(f"{n} {s[-1]:.2f} s" for n, s in seconds.items()), file=sys.stderr)
    median = {name: statistics.median(several[1:]) for name, several in seconds.items()}
    difference = float((rows["ours"] - rows["theirs"]).abs().max() / rows["theirs"].abs().max())
    return {
        "largest_difference_over_largest_feature": ("<= 1e-06", difference, "of it"),
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
        "version": None,
        "data": DataSetConfig(path=data),
        "reference": ReferenceConfig(path=data, cache=str(folder)),
        "sampling": SamplingConfig(batch_size=BATCH),
        "extractor_weights": {INCEPTION: str(weights)},
        "threads": 1,
        "gpu": False,
    }
    rates: list[float] = []
    found: list[np.ndarray] = []
    for workers in (1, 2):
        features = feature_set(weights, str(folder / str(workers)), num)
        units = [EvaluationUnit(part, features) for part in features.parts()]
        with Pool("ray", num_workers=workers) as pool:
            times = [time.perf_counter() for _ in pool.run(Scorer, arguments, units)]
        timed = len(units) - workers  # the first of each worker waits for the start
        rates.append(timed / (times[-1] - times[0]))  # what is left of other first parts counts against several
        found.append(features.rows("pool"))
        print(f"{workers} workers: {rates[-1]:.3g} parts/s", file=sys.stderr)
    return {
        "two_workers_over_one": (">= 1.6", rates[1] / rates[0], "times"),
        "one_worker_and_two_differ_by": ("0", float(np.abs(found[0] - found[1]).max()), ""),
    }


def peak_memory(code: str, *arguments: str) -> float:
    """Peak MiB of a separate process; ru_maxrss would include the memory of this process."""
    measured = f"{code}\nprint([line for line in open('/proc/self/status') if line.startswith('VmHWM')][0].split()[1])"
    command = [sys.executable, "-c", measured, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1]) / 1024


WIDE_DISTANCE = """
import sys
from tarflow_scale.metrics import jackknife
from tarflow_scale.metrics.frechet import frechet
from tarflow_scale.metrics.measure import Reducer, in_rounds
from tarflow_scale.metrics.store import FeatureSet, Images, write_arrays
from tarflow_scale.pool import Pool
folder, num = sys.argv[1], int(sys.argv[2])
jackknife.NUM_BLOCKS = 10
features = FeatureSet(Images("sample", num, 0, 8, "floor"), "x", "none", ("pool",), folder)
with Pool("ray", num_workers=2) as pool:
    measure = frechet(features, "pool", folder + "/reference.npz", infinity=False)
    print(in_rounds({"it": measure}, lambda tasks: pool.run(Reducer, {"threads": 1}, tasks)))
"""


def driver_memory_of_wide_features(folder: Path, small: int, large: int) -> dict[str, Figure]:
    """Peak memory of a driver that has the distance of 2,048 features computed, over two numbers of samples."""
    generator = np.random.default_rng(0)
    peaks: list[float] = []
    for num in (small, large):
        features = FeatureSet(Images("sample", num, 0, 8, "floor"), "x", "none", ("pool",), str(folder / f"wide-{num}"))
        for part in features.parts():
            part.write({"pool": generator.standard_normal((part.stop - part.start, 2048), dtype=np.float32)})
        reference = Moments(10**6, np.zeros(2048), np.eye(2048) * 10**6)
        write_arrays(features.beside("reference.npz"), reference.to_arrays("pool"))
        peaks.append(peak_memory(WIDE_DISTANCE, features.folder, str(num)))
        print(f"{num} wide features: {peaks[-1]:.0f} MiB", file=sys.stderr)
    return {
        "wide_driver_peak_memory": ("", peaks[1], "MiB"),
        "wide_features": ("", large * 2048 * 4 / 1024**2, "MiB"),
        f"wide_driver_memory_{large}_samples_over_{small}": ("<= 1.02", peaks[1] / peaks[0], "times"),
    }


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
        code = "import sys; from tarflow_scale.cli import main; assert main(sys.argv[1:]) == 0"
        peaks.append(peak_memory(code, "evaluate", *overrides))
    return {
        "driver_peak_memory": ("", peaks[1], "MiB"),
        f"driver_memory_{large}_samples_over_{small}": ("<= 1.02", peaks[1] / peaks[0], "times"),
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
        figures |= driver_memory_of_wide_features(folder, 1000, 20_000)
        if arguments.registry:
            figures |= driver_memory(arguments.registry, arguments.data, folder, 1000, 10_000)
    facts = {key: getattr(arguments, key) for key in ("images", "rounds", "parts")}
    write_results(arguments.output, "cpu", figures, **facts)


if __name__ == "__main__":
    main()
