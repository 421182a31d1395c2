"""Time and memory of `prepare` for the scan of foreign WebDataset tars.

    python evals/benchmarks/foreign_tars.py --output evals/results/foreign-tars-cpu.json

The writer of webdataset makes tars of tiny PNG images with labels. It records times in fractions of a second, so every
member has a PAX header; with such small images, reading headers dominates. ``prepare --dry-run`` with two workers is
timed as a whole: start of processes, scan, digest of all bytes, and decoding of 64 images. The scan of one tar in one
process is also measured in processor time, which other processes disturb less: with our reader of headers, and with
that of the standard library.
"""

import argparse
import pickle
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
from webdataset.writer import TarWriter

from evals.benchmarks.measuring import Figure, write_results
from tarflow_scale.config.prepare import SourceConfig
from tarflow_scale.shards.headers import Member, UnusualHeader
from tarflow_scale.shards.images import encode_png
from tarflow_scale.shards.sources import open_source, tar_scan
from tarflow_scale.shards.sources.tar_rules import Rules

SAMPLES, SAMPLES_PER_TAR, SIZE, WORKERS = 100_000, 5_000, 8, 2


def make(path: Path) -> None:
    """Write the tars."""
    rng = np.random.default_rng(0)
    images = [encode_png(rng.integers(0, 256, (3, SIZE, SIZE), np.uint8)) for _ in range(64)]
    for first in range(0, SAMPLES, SAMPLES_PER_TAR):
        with TarWriter(str(path / f"shard-{first // SAMPLES_PER_TAR:05d}.tar"), encoder=False) as writer:
            for number in range(first, first + SAMPLES_PER_TAR):
                label = str(number % 10).encode()
                writer.write({"__key__": f"{number:08d}", "png": images[number % len(images)], "cls": label})


def plan_seconds(folder: str) -> float:
    """Of ``prepare --dry-run``, as a user runs it."""
    arguments = ["source.kind=webdataset", f"source.path={folder}", f"shards.path={folder}/out"]
    command = [
        sys.executable,
        "-m",
        "tarflow_scale",
        "prepare",
        *arguments,
        f"shards.num_workers={WORKERS}",
        "--dry-run",
    ]
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


def scan_microseconds(path: Path) -> float:
    """Processor time of the scan of one tar, for each sample."""
    started = time.process_time()
    scanned = tar_scan.scan_tar("shard-00000.tar", str(path), Rules())
    return (time.process_time() - started) / len(scanned) * 1e6


def unusual(stream: IO[bytes], num_bytes: int) -> Iterator[Member]:
    """Replacement for our reader of headers, so that that of the standard library is used."""
    raise UnusualHeader(f"{num_bytes} bytes of {stream}")


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        make(path)
        seconds = min(plan_seconds(folder) for _ in range(arguments.rounds))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        source = open_source(SourceConfig(kind="webdataset", path=folder))
        memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        assert len(source) == SAMPLES
        sent = len(pickle.dumps(source))
        quick = min(scan_microseconds(path) for _ in range(arguments.rounds))
        tar_scan.plain_members = unusual  # pyright: ignore[reportAttributeAccessIssue]
        slow = min(scan_microseconds(path) for _ in range(arguments.rounds))
    figures: dict[str, Figure] = {
        "plan_of_100k_foreign_samples_2_workers": ("<= 15", seconds, "s"),
        "scan_processor_time": ("<= 100", quick, "us/sample"),
        "scan_processor_time_by_tarfile": ("", slow, "us/sample"),
        "added_memory": ("<= 1000", memory / SAMPLES, "bytes/sample"),
        "sent_to_a_packing_process": ("<= 100", sent / SAMPLES, "bytes/sample"),
    }
    write_results(arguments.output, "cpu", figures, rounds=arguments.rounds)


if __name__ == "__main__":
    main()
