"""What batch generation adds to sampling: encoding, tar, digests, records, writing and reading back of shards.

    python evals/benchmarks/generation.py --registry runs/demo/registry --output evals/results/generation-cpu.json

A worker's shards of 1,000 images take turns with the bare sampler, whose images go nowhere; the median of ``--rounds``.
Processor time, which other work on the machine does not change, is compared too.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from measuring import Figure, write_results

from tarflow_scale.config import GenerateConfig, SamplingConfig
from tarflow_scale.generate import resolved_plan
from tarflow_scale.loading import load_version
from tarflow_scale.making import ShardMaker, Unit
from tarflow_scale.sampling import Sampler
from tarflow_scale.shards.images import encode_image


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--registry", required=True, help="of the demo")
    parser.add_argument("--model", default="digits")
    parser.add_argument("--images", type=int, default=1000, help="a shard")
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    clocks = {"seconds": time.perf_counter, "processor": time.process_time}
    found: dict[str, list[float]] = {f"{what} {clock}": [] for what in ("bare", "shard") for clock in clocks}
    with tempfile.TemporaryDirectory() as folder:
        config = GenerateConfig.model_validate(
            {
                "registry": {"path": arguments.registry, "model": arguments.model},
                "sampling": {"num_images": arguments.images, "batch_size": arguments.batch},
                "shards": {"path": folder, "samples_per_shard": arguments.images},
            }
        )
        plan = resolved_plan(config)
        torch.set_num_threads(1)
        flow = load_version(arguments.registry, plan.model, plan.version)
        sampler = Sampler(flow, plan.seed, SamplingConfig.model_validate(plan.sampling))
        for number in range(arguments.rounds + 1):
            maker = ShardMaker(arguments.registry, plan, f"{folder}/{number}")
            runs = {
                "bare": lambda: sampler.images(range(arguments.images)),
                "shard": lambda m=maker: m.run(Unit(0, 0, arguments.images)),
            }
            for what, run in runs.items():
                before = {clock: read() for clock, read in clocks.items()}
                run()
                for clock, read in clocks.items():
                    if number:
                        found[f"{what} {clock}"].append(read() - before[clock])
        images = sampler.images(range(arguments.images)).numpy()
        started = time.perf_counter()
        for image in images:
            encode_image(image, "png")
        encoding = time.perf_counter() - started
    median = {key: statistics.median(several) for key, several in found.items()}
    figures: dict[str, Figure] = {
        "shard_over_sampling": ("<= 1.03", median["shard seconds"] / median["bare seconds"], "times"),
        "shard_over_sampling_processor_time": ("", median["shard processor"] / median["bare processor"], "times"),
        "encoding_over_sampling": ("< 1", encoding / median["bare seconds"], "of it"),
        "images_per_second": ("", arguments.images / median["shard seconds"], "images/s"),
    }
    facts = {key: getattr(arguments, key) for key in ("model", "images", "batch", "rounds")}
    write_results(arguments.output, "cpu", figures, **facts)


if __name__ == "__main__":
    main()
