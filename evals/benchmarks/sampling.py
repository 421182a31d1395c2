"""Sampling speed of a TarFlow: our decoders against apple/ml-tarflow's, with the same weights and latents, in one run.

    python evals/benchmarks/sampling.py --reference PATH --output evals/results/sampling-cpu.json
    python evals/benchmarks/sampling.py --reference PATH --size imagenet64 --precision bf16 --batch 128 \
        --output evals/results/sampling-h200.json
    python evals/benchmarks/sampling.py --flow runs/demo/train/model --output evals/results/adaptive-digits-cpu.json

PATH is a checkout of apple/ml-tarflow. Weights are random, scaled so that samples stay near the range of data; exact
decoding takes the same time for any weights. Variants take turns, and the median of ``--rounds`` turns counts. The
public sampler runs in fp32, or under bf16 autocast as in its evaluation. On a CPU our decoder in bf16 takes turns too.

The floor of exact decoding is the time to read, at the memory bandwidth of the device, the weights of a block and the
cache up to the token for every token, which every exact token-by-token sampler must do:

    sum over blocks and tokens t of  weights + rows x 2 x t x width x layers  elements

With ``--flow`` a trained flow is calibrated instead, which gives the speed-up and the error of the adaptive decoder.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from evals.benchmarks.measuring import Figure, public_tarflow, synchronize, write_results
from tarflow_scale.config.sampling import DecoderConfig, Guidance, SamplingConfig
from tarflow_scale.flows import load_flow
from tarflow_scale.flows.ml_tarflow import flow_from_ml_tarflow
from tarflow_scale.flows.tarflow import TarFlow
from tarflow_scale.sampling import calibrate
from tarflow_scale.sampling.decode import TarFlowDecoder

NUM_CLASSES = 10
GUIDANCE = 1.5


@dataclass(frozen=True)
class Sizes:
    """The model that is sampled."""

    image_size: int
    patch_size: int
    width: int
    blocks: int
    layers: int
    asked: tuple[str, str]
    """Of the ratio, guided and unguided."""
    reduced: str = ""
    """Of the ratio in bf16 to the public sampler in fp32."""


SIZES = {
    "256-tokens": Sizes(32, 2, 256, 4, 4, (">= 2.7", ">= 2.1"), ">= 4"),
    "1024-tokens": Sizes(64, 2, 256, 2, 4, (">= 3", ">= 3")),
    "imagenet64": Sizes(64, 2, 768, 8, 8, (">= 10 on an H200", "")),
    "imagenet64-patch4": Sizes(64, 4, 1024, 8, 8, ("", "")),
}


def public_model(checkout: Path, sizes: Sizes) -> Any:
    """The public model with random weights, small enough that samples do not diverge."""
    torch.manual_seed(0)
    model = public_tarflow(
        checkout, 3, sizes.image_size, sizes.patch_size, sizes.width, sizes.blocks, sizes.layers, True, NUM_CLASSES
    )
    for block in model.blocks:
        torch.nn.init.normal_(block.proj_out.weight, std=0.01)
    return model.eval().requires_grad_(False)


def in_turns(variants: dict[str, Callable[[], torch.Tensor]], rounds: int, device: str) -> dict[str, float]:
    """Median seconds of each, after one warm-up call."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, run in variants.items():
            synchronize(device)
            started = time.perf_counter()
            run()
            synchronize(device)
            if number:
                seconds[name].append(time.perf_counter() - started)
        print(f"round {number}: " + ", ".join(f"{n} {s[-1]:.2f} s" for n, s in seconds.items() if s), file=sys.stderr)
    return {name: statistics.median(several) for name, several in seconds.items()}


def against_public(arguments: argparse.Namespace, device: str) -> dict[str, Figure]:
    """Ratios to the public sampler, guided and not."""
    sizes, batch = SIZES[arguments.size], arguments.batch
    public = public_model(arguments.reference, sizes)
    flow = flow_from_ml_tarflow(dict(public.state_dict()), "random weights", 3).to(device).eval()
    public = public.to(device)
    assert isinstance(flow, TarFlow)
    dtype = torch.bfloat16 if arguments.precision == "bf16" else None
    decoder, reduced = TarFlowDecoder(flow, dtype), TarFlowDecoder(flow, torch.bfloat16)
    z = torch.randn(batch, decoder.num_tokens, flow.num_dims // decoder.num_tokens, device=device)
    y = torch.arange(batch, device=device) % NUM_CLASSES

    def public_sample(scale: float) -> torch.Tensor:
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=dtype is not None):
            return public.reverse(z.clone(), y, guidance=scale)

    def our_sample(decoder: TarFlowDecoder, scale: float) -> torch.Tensor:
        return decoder(z.flatten(1), y, Guidance(scale=scale) if scale else None)[0]

    figures: dict[str, Figure] = {}
    rows = {"guided": 2 * batch, "unguided": batch}
    bandwidth = arguments.bandwidth * 1e9 if arguments.bandwidth else copy_bandwidth(device)
    for name, scale, asked in (("guided", GUIDANCE, sizes.asked[0]), ("unguided", 0.0, sizes.asked[1])):
        variants = {"public": lambda s=scale: public_sample(s), "ours": lambda s=scale: our_sample(decoder, s)}
        difference = float((variants["public"]() - variants["ours"]()).abs().max())
        if dtype is None and device == "cpu":
            variants["ours in bf16"] = lambda s=scale: our_sample(reduced, s)
        seconds = in_turns(variants, arguments.rounds, device)
        floor = floor_bytes(sizes, decoder, rows[name]) / bandwidth
        figures |= {
            f"{name}_over_public": (asked, seconds["public"] / seconds["ours"], "times"),
            f"{name}_images_per_second": ("", batch / seconds["ours"], "images/s"),
            f"{name}_public_images_per_second": ("", batch / seconds["public"], "images/s"),
            f"{name}_fraction_of_floor": ("", floor / seconds["ours"], "of it"),
            f"{name}_largest_difference": ("<= 1e-05" if dtype is None else "", difference, "on [-1, 1]"),
        }
        if "ours in bf16" in seconds:
            figures[f"{name}_bf16_over_public_fp32"] = (
                sizes.reduced,
                seconds["public"] / seconds["ours in bf16"],
                "times",
            )
    cache = decoder.cache(rows["unguided"])
    exact = rows["unguided"] * 2 * decoder.num_tokens * sizes.width * sizes.layers * cache.itemsize
    figures["cache_over_arithmetic"] = ("<= 1.1", cache.nbytes / exact, "times")
    figures["bandwidth"] = ("", bandwidth / 1e9, "GB/s")
    return figures


def floor_bytes(sizes: Sizes, decoder: TarFlowDecoder, rows: int) -> float:
    """Bytes that exact decoding of a batch must read; the formula is at the top."""
    steps = decoder.num_tokens - 1
    weights = 12 * sizes.width**2 * sizes.layers * steps
    cache = rows * 2 * sizes.width * sizes.layers * steps * (steps + 1) / 2
    return sizes.blocks * (weights + cache) * decoder.dtype.itemsize


def copy_bandwidth(device: str) -> float:
    """Bytes per second that a sum over a large tensor reads."""
    values = torch.ones(1 << (28 if device == "cuda" else 26), device=device)
    return values.nbytes / min(in_turns({"sum": values.sum}, 5, device).values())


def adaptive(arguments: argparse.Namespace, device: str) -> dict[str, Figure]:
    """Results of calibration for a trained flow."""
    flow = load_flow(arguments.flow).to(device).eval()
    settings = SamplingConfig(
        batch_size=arguments.batch,
        guidance=Guidance(scale=arguments.guidance),
        decoder=DecoderConfig(kind="adaptive", precision=arguments.precision, tolerance=arguments.tolerance),
    )
    plan = calibrate(flow, 0, settings)
    figures: dict[str, Figure] = {
        "adaptive_over_exact": ("", plan.exact_seconds / plan.adaptive_seconds, "times"),
        "images_per_second": ("", plan.batch_size / plan.adaptive_seconds, "images/s"),
        "exact_images_per_second": ("", plan.batch_size / plan.exact_seconds, "images/s"),
        "max_error": ("", plan.max_error, "on [-1, 1]"),
        "mean_error": ("", plan.mean_error, "on [-1, 1]"),
        "pixels_within_one_level": (">= 0.999", plan.pixels_within_one_level, "of the pixels"),
    }
    for number, (block, mean) in enumerate(zip(plan.blocks, plan.iterations, strict=True), start=1):
        figures[f"block_{number}_chunk"] = ("", float(block.chunk), "tokens at once")
        figures[f"block_{number}_iterations"] = ("", mean, "a chunk")
    return figures


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, help="checkout of apple/ml-tarflow")
    parser.add_argument("--size", choices=SIZES, default="256-tokens")
    parser.add_argument("--flow", help="folder of a trained flow, to calibrate")
    parser.add_argument("--guidance", type=float, default=0.0, help="of --flow")
    parser.add_argument("--tolerance", type=float, default=DecoderConfig().tolerance)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bandwidth", type=float, help="of the device, GB/s; default: measured")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    if (arguments.reference is None) == (arguments.flow is None):
        parser.error("give either --reference or --flow")
    torch.set_num_threads(arguments.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    figures = (against_public if arguments.reference else adaptive)(arguments, device)
    names = ("size", "precision", "batch", "rounds")
    if arguments.flow:
        names = ("flow", "guidance", "tolerance", "precision", "batch")
    write_results(arguments.output, device, figures, **{key: getattr(arguments, key) for key in names})


if __name__ == "__main__":
    main()
