"""Time and memory of a TarFlow training step, ours against apple/ml-tarflow, in one run on one device.

    python evals/benchmarks/tarflow_training.py --ml-tarflow PATH --output evals/results/tarflow-training-cpu.json

Same sizes, batch, labels, precision and threads; forward and backward, no optimizer. Every variant runs in its own
process; rounds alternate and the fastest step counts, because other load only adds time. Peak memory is the addition of
a step in a process that has already taken a step of one image.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from evals.benchmarks.measuring import Figure, alternate, measure_step, public_tarflow, write_results
from tarflow_scale.config.model import TarFlowConfig
from tarflow_scale.flows import standard_normal_log_prob
from tarflow_scale.flows.tarflow import TarFlow

NUM_CLASSES = 10


@dataclass(frozen=True)
class Sizes:
    """The model and batch that are timed."""

    image_size: int
    patch_size: int
    width: int
    blocks: int
    layers: int
    batch: int


SIZES = {
    "256-tokens": Sizes(image_size=64, patch_size=4, width=256, blocks=4, layers=2, batch=8),
    "1024-tokens": Sizes(image_size=64, patch_size=2, width=256, blocks=2, layers=8, batch=2),
    "imagenet64": Sizes(image_size=64, patch_size=2, width=768, blocks=8, layers=8, batch=32),
}
"""The published ImageNet 64x64 model, for a GPU; for a CPU two of its blocks at a third of the width; a small one."""
VARIANTS = [
    ("public", "fp32", "keep"),
    ("ours", "fp32", "keep"),
    ("public", "bf16", "keep"),
    ("ours", "bf16", "keep"),
    ("ours", "fp32", "checkpoint"),
    ("ours", "bf16", "checkpoint"),
]


def public_model(checkout: Path, sizes: Sizes) -> Any:
    """The public model and its loss."""
    return public_tarflow(
        checkout, 3, sizes.image_size, sizes.patch_size, sizes.width, sizes.blocks, sizes.layers, True, NUM_CLASSES
    )


def our_model(sizes: Sizes, activations: str) -> TarFlow:
    """The same sizes."""
    layers = (sizes.layers,) * sizes.blocks
    config = TarFlowConfig(patch_size=sizes.patch_size, width=sizes.width, layers_per_block=layers)
    flow = TarFlow((3, sizes.image_size, sizes.image_size), NUM_CLASSES, config)
    flow.activations = activations  # pyright: ignore[reportAttributeAccessIssue]
    return flow


def matmul_ratio(device: str) -> float:
    """Speed of matrix products in bf16 over fp32 on this device: the upper bound of the gain of autocast."""
    seconds: dict[torch.dtype, float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(2048, 1024, device=device).to(dtype) for _ in range(2))
        seconds[dtype] = measure_step(lambda _, a=a, b=b: (a @ b.T, None)[1], 1, device, repeats=20)["seconds"]
    return seconds[torch.float32] / seconds[torch.bfloat16]


def worker(arguments: argparse.Namespace) -> None:
    """Measure one variant and print it."""
    who, precision, activations = arguments.worker
    device, sizes = arguments.device, SIZES[arguments.sizes]
    torch.manual_seed(0)
    model = public_model(arguments.ml_tarflow, sizes) if who == "public" else our_model(sizes, activations)
    model: Any = model.to(device).train()
    if arguments.compile:
        model.compile()
    x = torch.randn(sizes.batch, 3, sizes.image_size, sizes.image_size, device=device)
    y = torch.arange(sizes.batch, device=device) % NUM_CLASSES

    def step(batch: int) -> None:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bf16"):
            if who == "public":
                z, _, log_dets = model(x[:batch], y[:batch])
                loss = model.get_loss(z, log_dets)
            else:
                z, log_det = model(x[:batch], y[:batch])
                loss = -(standard_normal_log_prob(z) + log_det).mean() / z.shape[1]
        loss.backward()

    print(json.dumps(measure_step(step, sizes.batch, device, arguments.steps)))


def main() -> None:
    """Measure all variants, or one as a worker."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ml-tarflow", type=Path, required=True, help="a checkout of apple/ml-tarflow")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--sizes", choices=list(SIZES), default="256-tokens")
    parser.add_argument("--compile", action="store_true", help="torch.compile both")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="timed steps a round")
    parser.add_argument("--worker", nargs=3, metavar=("WHO", "PRECISION", "ACTIVATIONS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments)
        return
    common = ["--ml-tarflow", str(arguments.ml_tarflow), "--device", arguments.device, "--sizes", arguments.sizes]
    common += ["--steps", str(arguments.steps)]
    common += ["--compile"] if arguments.compile else []
    found = alternate(__file__, [[*variant, *common] for variant in VARIANTS], arguments.rounds)
    by_name = dict(zip(VARIANTS, found, strict=True))
    seconds = {key: value["seconds"] for key, value in by_name.items()}
    memory = {key: value["peak_mib"] for key, value in by_name.items()}
    public, ours = ("public", "bf16", "keep"), ("ours", "bf16", "keep")
    cuda = arguments.device == "cuda"
    figures: dict[str, Figure] = {
        "speed_bf16_over_public_bf16": (
            ">= 1.5" if cuda else ">= 1.15", seconds[public] / seconds[ours], "times"),
        "speed_fp32_over_public_fp32": (
            "", seconds["public", "fp32", "keep"] / seconds["ours", "fp32", "keep"], "times"),
        "speed_bf16_over_public_fp32": (
            "" if cuda else ">= 1.7", seconds["public", "fp32", "keep"] / seconds[ours], "times"),
        "speed_public_bf16_over_public_fp32": (
            "", seconds["public", "fp32", "keep"] / seconds[public], "times"),
        "memory_checkpointed_fp32_over_public_fp32": (
            "<= 0.5", memory["ours", "fp32", "checkpoint"] / memory["public", "fp32", "keep"], "of it"),
        "memory_checkpointed_bf16_over_public_bf16": (
            "<= 0.5", memory["ours", "bf16", "checkpoint"] / memory[public], "of it"),
    }  # fmt: skip
    figures["matmul_bf16_over_fp32"] = ("", matmul_ratio(arguments.device), "times")
    for variant, one in by_name.items():
        name = "_".join(variant)
        figures[f"images_per_second_{name}"] = ("", SIZES[arguments.sizes].batch / one["seconds"], "images/s")
        figures[f"peak_{name}"] = ("", one["peak_mib"], "MiB")
    if arguments.output:
        facts = {"sizes": asdict(SIZES[arguments.sizes]), "rounds": arguments.rounds, "compile": arguments.compile}
        write_results(arguments.output, arguments.device, figures, **facts, seeds={"weights": 0})


if __name__ == "__main__":
    main()
