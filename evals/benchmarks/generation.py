"""Overhead of batch generation over sampling: encoding, tar, digests, records, writing and verifying shards.

    python evals/benchmarks/generation.py --registry runs/demo/registry --output evals/results/generation-cpu.json

A worker that writes shards of 1,000 images takes turns with the bare sampler, which draws the same images and discards
them; the result is the median ratio of ``--rounds`` turns, after one warm-up turn. Processor times of the worker are
also compared, because other work on the machine changes them less; they exclude the encoding process.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from evals.benchmarks.measuring import Figure, write_results
from tarflow_scale.config.generate import GenerateConfig
from tarflow_scale.loading import load_version
from tarflow_scale.sampling import Sampler
from tarflow_scale.shards.images import encode_image
from tarflow_scale.verbs.generate.driver import resolved_plan
from tarflow_scale.verbs.generate.worker import ShardMaker, ShardUnit


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
    ratios: dict[str, list[float]] = {clock: [] for clock in clocks}
    bare_seconds: list[float] = []
    num, rounds = arguments.images, arguments.rounds
    with tempfile.TemporaryDirectory() as folder:
        config = GenerateConfig.model_validate(
            {
                "registry": {"path": arguments.registry, "model": arguments.model},
                "sampling": {"num_images": num * (rounds + 1), "batch_size": arguments.batch},
                "shards": {"path": folder, "samples_per_shard": num},
            }
        )
        plan = resolved_plan(config.registry, config.sampling, config.shards, config.cluster)
        torch.set_num_threads(1)
        flow = load_version(arguments.registry, plan.model, plan.version)
        sampler = Sampler(flow, plan.seed, plan.sampling)
        maker = ShardMaker(arguments.registry, plan, folder)
        for number in range(rounds + 1):
            unit = ShardUnit(number, number * num, (number + 1) * num)
            runs = [lambda u=unit: sampler.images(range(u.start, u.stop)), lambda u=unit: maker.run(u)]
            spent: list[dict[str, float]] = [{}, {}]
            for which in (0, 1) if number % 2 else (1, 0):
                before = {clock: read() for clock, read in clocks.items()}
                runs[which]()
                spent[which] = {clock: read() - before[clock] for clock, read in clocks.items()}
            if number:
                bare_seconds.append(spent[0]["seconds"])
                for clock in clocks:
                    ratios[clock].append(spent[1][clock] / spent[0][clock])
        images = sampler.images(range(num)).numpy()
        started = time.perf_counter()
        for image in images:
            encode_image(image, "png")
        encoding = time.perf_counter() - started
    bare = statistics.median(bare_seconds)
    figures: dict[str, Figure] = {
        "shard_over_sampling": ("<= 1.03", statistics.median(ratios["seconds"]), "times"),
        "shard_over_sampling_processor_time": ("", statistics.median(ratios["processor"]), "times"),
        "encoding_over_sampling": ("< 1", encoding / bare, "of it"),
        "images_per_second": ("", num / bare, "images/s"),
    }
    facts = {key: getattr(arguments, key) for key in ("model", "images", "batch", "rounds")}
    write_results(arguments.output, "cpu", figures, **facts)


if __name__ == "__main__":
    main()
