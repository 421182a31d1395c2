"""Damage data sets at random, read them as in training, and check that nothing crashes and no wrong pixel is returned.

    python evals/benchmarks/fuzz_shards.py --trials 1000 --output evals/results/fuzz-shards-cpu.json

Every trial copies a small data set, damages one file (bits flipped, bytes zeroed, truncated, deleted, swapped with
another, bytes inserted) before or after it is opened, and reads an epoch. The image of every sample is known, so a
wrong pixel is detected. Allowed results: no effect, quarantine, or an error of one line.

In a quarter of the trials the index and the manifest are updated to match the damage, so that it passes the checksums
and reaches the parsers and decoders; then pixels cannot be verified, but nothing may crash.
"""

import argparse
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from evals.benchmarks.measuring import write_results
from tarflow_scale import storage
from tarflow_scale.config.data import DataConfig
from tarflow_scale.errors import UserError
from tarflow_scale.shards import reader
from tarflow_scale.shards.images import CODECS
from tarflow_scale.shards.index import ShardIndex, checksum
from tarflow_scale.shards.loader import Loader
from tarflow_scale.shards.manifest import Manifest, index_name, read_manifest
from tarflow_scale.shards.mix import open_mix
from tarflow_scale.shards.writer import PackedShard, Sample, publish_manifest

SHARDS, SAMPLES, SIZE, BATCH = 3, 16, 4, 8
LIMIT_SECONDS = 30.0
OUTCOMES = ("quarantined", "clear error", "no effect", "read as packed")
"""What may come of a trial; the last only where the checksums agree with the damage."""


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


def agreed(rng: np.random.Generator, tar: Path, _: Path) -> None:
    """Damage one sample, and let its index and the manifest say that it was packed like that."""
    index_file = tar.with_name(index_name(tar.name))
    with np.load(index_file) as arrays:
        offsets, sums = arrays["offsets"], arrays["checksums"]
    number = int(rng.integers(len(sums)))
    low, high = int(offsets[number]), int(offsets[number + 1])
    content = bytearray(tar.read_bytes())
    part = tar.with_name("part")
    part.write_bytes(bytes(content[low:high]))
    (flip_bits, zero_bytes)[int(rng.integers(2))](rng, part, part)
    content[low:high] = part.read_bytes()
    part.unlink()
    sums[number] = checksum(bytes(content[low:high]))
    index = ShardIndex(offsets, sums).to_bytes()
    tar.write_bytes(bytes(content))
    index_file.write_bytes(index)
    manifest = read_manifest(str(tar.parent))
    digests = {"sha256": storage.digest(bytes(content)), "index_sha256": storage.digest(index)}
    records = [one.model_copy(update=digests) if one.file == tar.name else one for one in manifest.shards]
    publish_manifest(str(tar.parent), manifest.model_copy(update={"shards": tuple(records)}))


class Hang(BaseException):
    """A trial takes too long."""


def hang(*_: object) -> None:
    """Signal handler."""
    raise Hang


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
        for image, label, number in zip(batch.events, batch.labels, batch.samples, strict=True):
            wrong += not np.array_equal(image, pixels(int(number))) or label != number % 5
    batches.close()
    return wrong, len(quarantine.read_text().splitlines()) if quarantine.exists() else 0


def trial(seed: int, healthy: dict[str, Path], folder: Path) -> tuple[str, str]:
    """Name of the damage, and its result."""
    rng = np.random.default_rng(seed)
    codec = sorted(healthy)[int(rng.integers(len(healthy)))]
    path = folder / "data"
    shutil.copytree(healthy[codec], path)
    tars = sorted(path.glob("*.tar"))
    kind = ("tar", "tar", "tar", "index", "manifest", f"{codec} sample", f"{codec} sample")[int(rng.integers(7))]
    files = {"index": sorted(path.glob("*.npz")), "manifest": [path / "manifest.json"]}.get(kind, tars)
    damage = agreed if kind.endswith("sample") else DAMAGES[int(rng.integers(len(DAMAGES)))]
    file, other = files[int(rng.integers(len(files)))], tars[int(rng.integers(len(tars)))]
    late = bool(rng.integers(2)) and damage is not agreed
    name = f"{kind}: {damage.__name__}{' while open' if late else ''}"

    def act() -> None:
        damage(rng, file, other)

    signal.signal(signal.SIGALRM, hang)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_SECONDS)
    try:
        if not late:
            act()
        wrong, quarantined = read_epoch(path, act if late else lambda: None, folder / "quarantine.jsonl")
        outcome = "quarantined" if quarantined else "no effect"
        if wrong:
            outcome = "read as packed" if damage is agreed else "WRONG PIXELS"
    except UserError as error:
        outcome = "clear error" if "\n" not in str(error) else "ERROR OF MANY LINES"
    except Exception as error:  # the outcome that this script looks for
        outcome = f"CRASH {type(error).__name__}: {error}"
    except Hang:
        outcome = "HANG"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
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
        healthy = {codec: Path(top) / codec for codec in CODECS if codec != "jpeg"}  # whose pixels would differ
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
    allowed = sum(outcomes[name] for name in OUTCOMES)
    figures = {
        "trials": (">= 1000", float(arguments.trials), "damaged data sets"),
        "crashes_hangs_wrong_pixels": ("0", float(arguments.trials - allowed), "of them"),
        **{name.replace(" ", "_"): ("", float(outcomes[name]), "of them") for name in OUTCOMES},
    }
    if arguments.output:
        seeds = {"first_trial": arguments.seed * 1_000_000}
        write_results(arguments.output, "cpu", figures, seeds=seeds, counts=dict(sorted(table.items())))
    raise SystemExit(int(allowed < arguments.trials))


if __name__ == "__main__":
    main()
