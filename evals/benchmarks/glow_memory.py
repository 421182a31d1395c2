"""Memory and time of a Glow training step that keeps, checkpoints or rebuilds its activations, at depth 8 and 32.

    python evals/benchmarks/glow_memory.py --output evals/results/glow-memory-cpu.json

Width 512, 3 levels, affine, LU; forward and backward. Every variant runs in its own process; rounds alternate and the
fastest step counts. Peak memory is the addition of a step in a process that has already taken a step of one image, so
it excludes weights and gradients. The 256x256 recipe (configs/train/celebahq256-glow.yaml) takes one whole training
step, including AdamW, with one image.
"""

import argparse
import json
import resource
import time
from pathlib import Path

import torch

from evals.benchmarks.measuring import Figure, alternate, measure_step, synchronize, write_results
from tarflow_scale.capacity.activations import activation_footprint
from tarflow_scale.config.model import GlowConfig
from tarflow_scale.config.train import TrainConfig
from tarflow_scale.flows import Flow, build, standard_normal_log_prob
from tarflow_scale.flows.glow import Glow

LEVELS, WIDTH, IMAGE = 3, 512, 32
BATCH = {"cpu": 8, "cuda": 64}
VARIANTS = [(how, depth) for depth in ("8", "32") for how in ("keep", "checkpoint", "rebuild")]
RECIPE = Path(__file__).resolve().parents[2] / "configs/train/celebahq256-glow.yaml"
_GIB = 1024**3


def loss_of(flow: Flow, x: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood per dimension."""
    z, log_det = flow(x)
    return -(standard_normal_log_prob(z) + log_det).mean() / flow.num_dims


def worker(variant: list[str], device: str, steps: int) -> None:
    """Measure one variant and print it."""
    how, depth = variant
    torch.manual_seed(0)
    config = GlowConfig(levels=LEVELS, steps_per_level=int(depth), width=WIDTH)
    flow = Glow((3, IMAGE, IMAGE), None, config).to(device)
    x = 2 * torch.rand(BATCH[device], 3, IMAGE, IMAGE, device=device) - 1
    flow.initialize(x)
    flow.activations = how  # pyright: ignore[reportAttributeAccessIssue]
    print(json.dumps(measure_step(lambda batch: loss_of(flow, x[:batch]).backward(), len(x), device, steps)))


def large(device: str) -> dict[str, float]:
    """One training step of the 256x256 recipe on one image: parameters, seconds, and peak memory of the process."""
    config = TrainConfig.load(RECIPE, [])
    assert isinstance(config.model, GlowConfig)
    torch.manual_seed(0)
    flow = build(config.model, (3, 256, 256), None).to(device)
    x = (torch.randint(0, 32, (1, 3, 256, 256), device=device) + torch.rand(1, 3, 256, 256, device=device)) / 16 - 1
    flow.initialize(x)
    flow.activations = config.parallelism.activations
    optimizer = torch.optim.AdamW(flow.parameters(), lr=config.optimizer.peak_lr)
    started = time.perf_counter()
    loss = loss_of(flow, x)
    loss.backward()
    optimizer.step()
    synchronize(device)
    seconds = time.perf_counter() - started
    finite = all(bool(torch.isfinite(p).all()) for p in flow.parameters()) and bool(torch.isfinite(loss))
    if not finite:
        raise SystemExit("the step of the 256x256 recipe is not finite")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    shape = (3, 256, 256)
    return {
        "parameters": float(sum(p.numel() for p in flow.parameters())),
        "seconds": seconds,
        "peak_bytes": float(torch.cuda.max_memory_allocated() if device == "cuda" else peak),
        "would_keep_bytes": activation_footprint(config.model, shape, 1, "keep", bf16=False).kept,
    }


def main() -> None:
    """Measure all variants, or one as a worker."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="timed steps a round")
    parser.add_argument("--worker", nargs=2, metavar=("HOW", "DEPTH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, arguments.device, arguments.steps)
        return
    common = ["--device", arguments.device, "--steps", str(arguments.steps)]
    found = alternate(__file__, [[*variant, *common] for variant in VARIANTS], arguments.rounds)
    by_name = dict(zip(VARIANTS, found, strict=True))
    recipe = large(arguments.device)
    rebuilt, kept = by_name["rebuild", "32"], by_name["keep", "32"]
    figures: dict[str, Figure] = {
        "memory_rebuilt_32_over_8": ("<= 1.15", rebuilt["peak_mib"] / by_name["rebuild", "8"]["peak_mib"], "times"),
        "time_rebuilt_over_kept_32": ("<= 1.6", rebuilt["seconds"] / kept["seconds"], "times"),
        "time_rebuilt_over_kept_8": (
            "", by_name["rebuild", "8"]["seconds"] / by_name["keep", "8"]["seconds"], "times"),
        "memory_rebuilt_over_kept_32": ("", rebuilt["peak_mib"] / kept["peak_mib"], "of it"),
        "memory_kept_32_over_8": ("", kept["peak_mib"] / by_name["keep", "8"]["peak_mib"], "times"),
        "recipe_256_parameters": ("", recipe["parameters"] / 1e6, "million"),
        "recipe_256_seconds_a_step": ("", recipe["seconds"], "s"),
        "recipe_256_peak_memory": ("<= 6 GiB", recipe["peak_bytes"] / _GIB, "GiB of the whole process"),
        "recipe_256_activations_if_kept": ("", recipe["would_keep_bytes"] / _GIB, "GiB, estimated"),
    }  # fmt: skip
    for (how, depth), one in by_name.items():
        figures[f"peak_{how}_{depth}"] = ("", one["peak_mib"], "MiB")
        figures[f"seconds_{how}_{depth}"] = ("", one["seconds"], "s")
    if arguments.output:
        sizes = {"levels": LEVELS, "width": WIDTH, "image_size": IMAGE, "batch": BATCH[arguments.device]}
        write_results(arguments.output, arguments.device, figures, sizes=sizes, seeds={"weights": 0})


if __name__ == "__main__":
    main()
