"""Images per second of the loader against a bare loop, plain webdataset and itself over S3; and a seek in a million.

    python evals/benchmarks/loader.py --output evals/results/loader-cpu.json

Two data sets of synthetic pictures (noise at octaves, which compresses like photographs) are packed: 64 px PNG and
512 px JPEG. Every variant reads the same tars with the same decoder. Variants without processes or threads take turns
of a few batches in one process, and the median turn counts, so that other load affects all equally; the others run in
their own process, rounds alternate and the fastest counts.

* bare: image members are in memory; one thread decodes them, as in Pillow's documentation, and stacks batches.
* decoder: the same with our decoder, which refuses other sizes and is faster.
* ours: the loader with checksums and order, without worker processes and with two.
* s3: the loader without worker processes, over an S3 server on this machine that answers 30 ms late; and the local
  rate with the same shuffle block. Both are measured for longer, because streams start with two blocks in memory.
* webdataset: WebDataset(shardshuffle).shuffle(1000), the same decoding and batching, without workers and with two.

Every tar is linked eight times for longer epochs. The data set of a million samples is one shard of a thousand samples,
linked a thousand times; it is opened, and the first batch in the middle of an epoch is read.
"""

import argparse
import io
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from evals.benchmarks.measuring import Figure, alternate, write_results
from evals.benchmarks.s3_server import serving
from tarflow_scale import storage
from tarflow_scale.config.data import DataConfig
from tarflow_scale.shards.images import decode_image
from tarflow_scale.shards.loader import Loader
from tarflow_scale.shards.manifest import Manifest, ShardRecord, index_name
from tarflow_scale.shards.mix import open_mix
from tarflow_scale.shards.reader import ShardSet
from tarflow_scale.shards.writer import PackedShard, Sample, publish_manifest

SETS = {"png64": ("png", 64, 8, 500, 64), "jpeg512": ("jpeg", 512, 8, 50, 16)}
"""Codec, pixels, different shards, samples of a shard, batch."""
S3_BLOCK = {"png64": 256, "jpeg512": 32}
"""``data.shuffle_block`` of the comparison with S3: reads of about 2 MB, as `DataConfig` advises."""
BLOCK = {"png64": 64, "jpeg512": 16}
"""``data.shuffle_block`` of the others, as in recipes for such images."""
LINKS = 8
DELAY_SECONDS = 0.03
VARIANTS = [
    (name, who, workers)
    for name in SETS
    for who, workers in (
        ("in turns", "0"),
        ("ours", "2"),
        ("webdataset", "2"),
        ("local", "0"),
        ("s3", "0"),
    )
]
IN_TURNS = ("bare", "decoder", "ours", "webdataset")
WARM_UP_BATCHES = 4
TURN_BATCHES = 4
TURNS_TIMES = 5
"""How much longer they are measured, for there are four of them."""
S3_TIMES = 3
"""How much longer the comparison with S3 is measured: every slot must come to new blocks."""


def picture(number: int, size: int) -> np.ndarray:
    """Noise at octaves, ``(3, size, size)`` uint8."""
    rng = np.random.default_rng(number)
    total = np.zeros((size, size, 3))
    cells = 4
    while cells <= size:
        noise = rng.integers(0, 256, (cells, cells, 3), np.uint8)
        total += np.asarray(Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC)) * (2.0 / cells)
        cells *= 2
    total = (total - total.min()) / (total.max() - total.min())
    return (total * 255).astype(np.uint8).transpose(2, 0, 1)


def make(path: Path, name: str) -> None:
    """Pack a data set, unless it is there."""
    codec, size, shards, samples, _ = SETS[name]
    if (path / name / "manifest.json").exists():
        return
    records = []
    for shard in range(shards):
        numbers = range(shard * samples, (shard + 1) * samples)
        made = [Sample(f"{n:08d}", picture(n, size), n % 10) for n in numbers]
        packed = PackedShard.of(f"train-{shard:05d}.tar", made, codec)  # pyright: ignore[reportArgumentType]
        packed.write(str(path / name))
        records.append(packed.record)
    for link in range(shards, shards * LINKS):
        original = records[link % shards]
        records.append(linked(path / name, original, f"train-{link:05d}.tar"))
    publish_manifest(str(path / name), manifest_of(name, size, tuple(records), codec))


def linked(folder: Path, original: ShardRecord, name: str) -> ShardRecord:
    """The same shard under another name."""
    os.link(folder / original.file, folder / name)
    os.link(folder / index_name(original.file), folder / index_name(name))
    return original.model_copy(update={"file": name})


def manifest_of(name: str, size: int, records: tuple[Any, ...], codec: str) -> Manifest:
    """The manifest of a benchmark's data set."""
    return Manifest(
        name=name,
        split="train",
        image_size_pixels=size,
        num_channels=3,
        class_names=tuple(str(c) for c in range(10)),
        bit_depth=8,
        codec=codec,
        source="evals/benchmarks/loader.py",
        recipe="0" * 64,
        shards=records,
    )


def by_pillow(content: bytes, _: str) -> np.ndarray:
    """An image as Pillow's documentation shows it."""
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).transpose(2, 0, 1)


def bare(path: Path, batch: int, decode: Callable[[bytes, str], np.ndarray] = by_pillow) -> Generator[int]:
    """Decode what is in memory."""
    shards = ShardSet(str(path))
    stored = [
        sample.members()
        for number, record in enumerate(shards.manifest.shards[: len(shards.manifest.shards) // LINKS])
        for sample in shards.read_run(number, 0, record.samples)
    ]
    extension = next(extension for extension in ("png", "jpg") if extension in stored[0])
    while True:
        for low in range(0, len(stored) - batch + 1, batch):
            part = stored[low : low + batch]
            images = np.stack([decode(sample[extension], "bare") for sample in part])
            labels = np.array([int(sample["cls"]) for sample in part])
            assert len(images) == len(labels)
            yield batch


def ours(path: str, batch: int, workers: int, block: int) -> Generator[int]:
    """The loader."""
    config = DataConfig(path=path, num_workers=workers, shuffle_block=block)
    mix = open_mix(config, batch, 0)
    for one in Loader(mix, range(batch), config, 0).batches(0):
        yield len(one.events)


def decoded(sample: dict[str, Any]) -> tuple[np.ndarray, int]:
    """A sample of plain webdataset, by our decoder."""
    content = sample.get("png") or sample["jpg"]
    return decode_image(content, sample["__key__"]), int(sample["cls"])


def plain_webdataset(path: Path, batch: int, workers: int) -> Generator[int]:
    """Plain webdataset, as its documentation shows it."""
    from webdataset.compat import WebDataset, WebLoader

    urls = sorted(str(tar) for tar in path.glob("*.tar"))
    data: Any = WebDataset(urls, shardshuffle=len(urls)).shuffle(1000).map(decoded).batched(batch, partial=False)
    while True:
        for images, _ in WebLoader(data, batch_size=None, num_workers=workers):
            yield len(images)


def stream_of(name: str, who: str, workers: int, data: Path) -> Generator[int]:
    """The batches of one variant."""
    path, batch = data / name, SETS[name][4]
    match who:
        case "bare":
            return bare(path, batch)
        case "decoder":
            return bare(path, batch, decode_image)
        case "ours":
            return ours(str(path), batch, workers, BLOCK[name])
        case "local":
            return ours(str(path), batch, workers, S3_BLOCK[name])
        case "s3":
            return ours(f"s3://{data.name}/{name}", batch, workers, S3_BLOCK[name])
        case _:
            return plain_webdataset(path, batch, workers)


def in_turns(streams: dict[str, Generator[int]], seconds: float) -> dict[str, float]:
    """Seconds per image of several streams: the median of their turns."""
    turns: dict[str, list[float]] = {who: [] for who in streams}
    for stream in streams.values():
        for _ in range(WARM_UP_BATCHES):
            next(stream)
    started = time.perf_counter()
    while time.perf_counter() - started < seconds:
        for who, stream in streams.items():
            begun = time.perf_counter()
            images = sum(next(stream) for _ in range(TURN_BATCHES))
            turns[who].append((time.perf_counter() - begun) / images)
    return {who: statistics.median(times) for who, times in turns.items()}


def worker(variant: list[str], data: Path, seconds: float) -> None:
    """Measure one variant, or the variants that take turns, and print seconds per image."""
    name, who, workers = variant
    if who == "in turns":
        found = in_turns({one: stream_of(name, one, 0, data) for one in IN_TURNS}, seconds * TURNS_TIMES)
        print(json.dumps({"seconds": sum(found.values()), "peak_mib": 0.0, **found}))
        return
    stream = stream_of(name, who, int(workers), data)
    for _ in range(WARM_UP_BATCHES):
        next(stream)
    started, images = time.perf_counter(), 0
    while time.perf_counter() - started < seconds * (S3_TIMES if who in ("s3", "local") else 1):
        images += next(stream)
    elapsed = time.perf_counter() - started
    print(json.dumps({"seconds": elapsed / images, "peak_mib": 0.0}))
    stream.close()


def million(folder: Path) -> dict[str, float]:
    """Open a data set of a million samples, go to the middle of an epoch, and read a batch."""
    rng = np.random.default_rng(0)
    samples = [Sample(f"{n:04d}", rng.integers(0, 256, (3, 8, 8), np.uint8), n % 10) for n in range(1000)]
    packed = PackedShard.of("base.tar", samples)
    packed.write(str(folder))
    records = []
    for number in range(1000):
        records.append(linked(folder, packed.record, f"train-{number:05d}.tar"))
    publish_manifest(str(folder), manifest_of("million", 8, tuple(records), "png"))
    read: list[int] = []
    original = storage.read_range

    def counted(location: str, start: int, stop: int) -> bytes:
        read.append(stop - start)
        return original(location, start, stop)

    storage.read_range = counted
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    config = DataConfig(path=str(folder))
    mix = open_mix(config, 256, 0)
    batch = next(Loader(mix, range(256), config, 0).batches(500_000 // 256 * 256))
    seconds = time.perf_counter() - started
    storage.read_range = original
    assert len(batch.events) == 256
    return {
        "seconds": seconds,
        "mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
        "read_over_bound": sum(read) / (256 * config.shuffle_block * mix.bytes_per_sample),
    }


def main() -> None:
    """Measure all variants, or one as a worker."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--worker", nargs=3, metavar=("SET", "WHO", "WORKERS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, arguments.data, arguments.seconds)
        return
    with tempfile.TemporaryDirectory() as top:
        bucket = Path(top) / "bucket"
        seek = million(bucket / "million")
        for name in SETS:
            make(bucket, name)
        common = ["--data", str(bucket), "--seconds", str(arguments.seconds)]
        with serving(Path(top), DELAY_SECONDS) as environment:
            os.environ.update(environment)
            variants = [[*variant, *common] for variant in VARIANTS]
            found = alternate(__file__, variants, arguments.rounds, memory=False)
    rate = {
        variant: 1 / one["seconds"] for variant, one in zip(VARIANTS, found, strict=True) if variant[1] != "in turns"
    }
    for (name, who, workers), one in zip(VARIANTS, found, strict=True):
        if who == "in turns":
            rate |= {(name, one_of_them, workers): 1 / one[one_of_them] for one_of_them in IN_TURNS}
    figures: dict[str, Figure] = {
        "png64_over_bare": (">= 0.9", rate["png64", "ours", "0"] / rate["png64", "bare", "0"], "times"),
        "jpeg512_over_bare": (">= 0.9", rate["jpeg512", "ours", "0"] / rate["jpeg512", "bare", "0"], "times"),
        "png64_over_our_decoder": ("", rate["png64", "ours", "0"] / rate["png64", "decoder", "0"], "times"),
        "jpeg512_over_our_decoder": ("", rate["jpeg512", "ours", "0"] / rate["jpeg512", "decoder", "0"], "times"),
        "png64_s3_over_local": (">= 0.8", rate["png64", "s3", "0"] / rate["png64", "local", "0"], "times"),
        "jpeg512_s3_over_local": (">= 0.8", rate["jpeg512", "s3", "0"] / rate["jpeg512", "local", "0"], "times"),
    }
    for name, asked in (("png64", ">= 1.2"), ("jpeg512", ">= 1")):
        for workers in ("0", "2"):
            ratio = rate[name, "ours", workers] / rate[name, "webdataset", workers]
            figures[f"{name}_over_webdataset_{workers}_workers"] = (asked, ratio, "times")
    figures |= {
        "million_seconds_to_first_batch": ("<= 2", seek["seconds"], "s"),
        "million_added_memory": ("<= 200", seek["mib"], "MiB"),
        "resume_bytes_over_a_block_per_slot": ("<= 1", seek["read_over_bound"], "of it"),
    }
    figures |= {f"images_per_second_{'_'.join(variant)}": ("", got, "images/s") for variant, got in rate.items()}
    if arguments.output:
        write_results(arguments.output, "cpu", figures, rounds=arguments.rounds, seconds=arguments.seconds)


if __name__ == "__main__":
    main()
