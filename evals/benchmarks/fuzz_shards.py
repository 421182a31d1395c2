"""Damage data sets at random, read them as training does, and see that nothing worse than an error happens.

    python evals/benchmarks/fuzz_shards.py --trials 1000 --output evals/results/fuzz-shards-cpu.json

Every trial copies a small data set, damages one file of it (bits flipped, bytes zeroed, cut short, deleted, swapped
with another, bytes inserted), before it is opened or afterwards, and reads an epoch. The image of sample n is known, so
that a wrong pixel cannot pass. Allowed are: no effect, quarantine, and an error of one line.
"""

import argparse
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from measuring import write_results

from tarflow_scale.config import DataConfig
from tarflow_scale.errors import UserError
from tarflow_scale.shards import reader
from tarflow_scale.shards.images import CODECS
from tarflow_scale.shards.loader import Loader
from tarflow_scale.shards.manifest import Manifest
from tarflow_scale.shards.mix import open_mix
from tarflow_scale.shards.writer import PackedShard, Sample, publish_manifest

SHARDS, SAMPLES, SIZE, BATCH = 3, 16, 4, 8
LIMIT_SECONDS = 30.0


def pixels(number: int) -> np.ndarray:
    """The image of a sample, different for each."""
    return np.random.default_rng(number).integers(0, 256, (3, SIZE, SIZE), np.uint8)


def make(path: Path, codec: str) -> None:
    """The healthy data set."""
    path.mkdir(parents=True)
    records = []
    for shard in range(SHARDS):
        numbers = range(shard * SAMPLES, (shard + 1) * SAMPLES)
        samples = [Sample(f"{n:06d}", pixels(n), n % 5) for n in numbers]
        packed = PackedShard.of(f"train-{shard:05d}.tar", samples, codec)  # pyright: ignore[reportArgumentType]
        packed.write(str(path))
        records.append(packed.record)
    manifest = Manifest(
        name="fuzz",
        split="train",
        image_size_pixels=SIZE,
        num_channels=3,
        class_names=("a", "b", "c", "d", "e"),
        bit_depth=8,
        codec=codec,
        source="fuzz_shards.py",
        recipe="0" * 64,
        shards=tuple(records),
    )
    publish_manifest(str(path), manifest)


def flip_bits(rng: np.random.Generator, file: Path, _: Path) -> None:
    """One to eight bits."""
    content = bytearray(file.read_bytes())
    for _bit in range(int(rng.integers(1, 9))):
        content[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
    file.write_bytes(bytes(content))


def zero_bytes(rng: np.random.Generator, file: Path, _: Path) -> None:
    """A run of zeros."""
    content = bytearray(file.read_bytes())
    start, length = int(rng.integers(len(content))), int(rng.integers(1, 2048))
    content[start : start + length] = bytes(len(content[start : start + length]))
    file.write_bytes(bytes(content))


def cut(rng: np.random.Generator, file: Path, _: Path) -> None:
    """The end is missing."""
    file.write_bytes(file.read_bytes()[: int(rng.integers(file.stat().st_size))])


def delete(_: np.random.Generator, file: Path, __: Path) -> None:
    """The file is gone."""
    file.unlink()


def swap(_: np.random.Generator, file: Path, other: Path) -> None:
    """Two files have each other's content."""
    first, second = file.read_bytes(), other.read_bytes()
    file.write_bytes(second)
    other.write_bytes(first)


def insert(rng: np.random.Generator, file: Path, _: Path) -> None:
    """Bytes that were not there."""
    content = file.read_bytes()
    at = int(rng.integers(len(content)))
    file.write_bytes(content[:at] + rng.bytes(int(rng.integers(1, 600))) + content[at:])


DAMAGES: tuple[Callable[[np.random.Generator, Path, Path], None], ...] = (
    flip_bits, flip_bits, flip_bits, zero_bytes, cut, delete, swap, insert,
)  # fmt: skip


def read_epoch(path: Path, after_opening: Callable[[], None], quarantine: Path) -> tuple[int, int]:
    """Wrong images, and quarantined samples, of an epoch."""
    config = DataConfig(path=str(path), shuffle_block=4, max_corrupt_fraction=1)
    mix = open_mix(config, BATCH, 0)
    after_opening()
    loader = Loader(mix, range(BATCH), config, 0, str(quarantine))
    wrong = 0
    batches = loader.batches(0)
    for _ in range(SHARDS * SAMPLES // BATCH):
        batch = next(batches)
        for image, label, number in zip(batch.images, batch.labels, batch.samples, strict=True):
            wrong += not np.array_equal(image, pixels(int(number))) or label != number % 5
    batches.close()
    return wrong, len(quarantine.read_text().splitlines()) if quarantine.exists() else 0


def trial(seed: int, healthy: dict[str, Path], folder: Path) -> tuple[str, str]:
    """Name of the damage, and what came of it."""
    rng = np.random.default_rng(seed)
    codec = sorted(healthy)[int(rng.integers(len(healthy)))]
    path = folder / "data"
    shutil.copytree(healthy[codec], path)
    tars = sorted(path.glob("*.tar"))
    kind = ("tar", "tar", "tar", "index", "manifest")[int(rng.integers(5))]
    files = {"tar": tars, "index": sorted(path.glob("*.npz")), "manifest": [path / "manifest.json"]}[kind]
    damage = DAMAGES[int(rng.integers(len(DAMAGES)))]
    file, other = files[int(rng.integers(len(files)))], tars[int(rng.integers(len(tars)))]
    late = bool(rng.integers(2))
    name = f"{kind}: {damage.__name__}{' while open' if late else ''}"

    def act() -> None:
        damage(rng, file, other)

    started = time.monotonic()
    try:
        if not late:
            act()
        wrong, quarantined = read_epoch(path, act if late else lambda: None, folder / "quarantine.jsonl")
        outcome = "WRONG PIXELS" if wrong else "quarantined" if quarantined else "no effect"
    except UserError as error:
        outcome = "clear error" if "\n" not in str(error) else "ERROR OF MANY LINES"
    except Exception as error:  # the outcome that this script looks for
        outcome = f"CRASH {type(error).__name__}: {error}"
    if time.monotonic() - started > LIMIT_SECONDS:
        outcome = "HANG"
    return name, outcome


def main() -> None:
    """Run all trials and write the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    reader.FIRST_WAIT_SECONDS = 0.0  # a deleted shard would be waited for
    outcomes, table = Counter[str](), Counter[str]()
    with tempfile.TemporaryDirectory() as top:
        healthy = {codec: Path(top) / codec for codec in CODECS if codec != "jpeg"}
        for codec, path in healthy.items():
            make(path, codec)
        for number in range(arguments.trials):
            folder = Path(top) / "trial"
            name, outcome = trial(arguments.seed * 1_000_000 + number, healthy, folder)
            shutil.rmtree(folder)
            outcomes[outcome] += 1
            table[f"{name} -> {outcome}"] += 1
            if outcome.isupper() or outcome.startswith("CRASH"):
                print(f"trial {number}: {name}: {outcome}")
    allowed = sum(outcomes[name] for name in ("no effect", "quarantined", "clear error"))
    figures = {
        "trials": (">= 1000", float(arguments.trials), "damaged data sets"),
        "crashes_hangs_wrong_pixels": ("0", float(arguments.trials - allowed), "of them"),
        **{
            name.replace(" ", "_"): ("", float(outcomes[name]), "of them")
            for name in ("quarantined", "clear error", "no effect")
        },
    }
    if arguments.output:
        seeds = {"first_trial": arguments.seed * 1_000_000}
        write_results(arguments.output, "cpu", figures, seeds=seeds, counts=dict(sorted(table.items())))
    raise SystemExit(int(allowed < arguments.trials))


if __name__ == "__main__":
    main()
