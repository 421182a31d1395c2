"""Overhead of training (engine, averages, checkpoints, uploads), or the utilisation of a configuration.

    python evals/benchmarks/training.py --output evals/results/training-cpu.json
    python evals/benchmarks/training.py --config configs/train/imagenet64-conditional.yaml --pixels 64 --classes 1000 \
        --output evals/results/training-h200.json

Without a configuration: a TarFlow on 32x32 images (width 256, 4 blocks of 2 layers, 256 tokens), batch 8, one thread.
All variants run in one process and take turns of one step in varying order, so that other load affects all equally; the
result is the median over rounds of the ratio of two variants.

* bare: forward, backward, clipping, fused AdamW, in plain PyTorch.
* stage0, stage2: the same with our engine under DeepSpeed, as in training.
* averages: stage 2 with two moving averages.
* looked: stage 2, after a validation with averaged weights.
* upload: stage 2, while the checkpoint of this model is copied to another folder; also spread over the 10 steps between
  two checkpoints, which is far more frequent than in any recipe.

With a configuration: images per second, tokens per second and model FLOPs utilisation of a step on synthetic images of
its size. The peak is that of the data sheet for a known GPU; elsewhere that of a large matrix product in the same
precision.
"""

import argparse
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evals.benchmarks.measuring import Figure, synchronize, write_results
from tarflow_scale.capacity.flops import tokens_per_image, training_flops
from tarflow_scale.config.model import FlowConfig, TarFlowConfig
from tarflow_scale.config.parallelism import ParallelismConfig
from tarflow_scale.config.train import CheckpointConfig, OptimizerConfig, TrainConfig, TrainingConfig
from tarflow_scale.errors import ConfigError
from tarflow_scale.flows import Flow, build, standard_normal_log_prob
from tarflow_scale.runtime.processes import leave
from tarflow_scale.runtime.provenance import peak_memory_bytes
from tarflow_scale.training import checkpoint
from tarflow_scale.training.checkpoint import TrainState
from tarflow_scale.training.ema import WeightAverages
from tarflow_scale.training.engine import Engine, start_process_group
from tarflow_scale.training.meter import peak_flops_of
from tarflow_scale.training.objective import FlowObjective
from tarflow_scale.training.upload import Uploader

SHAPE, BATCH, CLASSES = (3, 32, 32), 8, 10
MODEL = TarFlowConfig(patch_size=2, width=256, layers_per_block=(2, 2, 2, 2))
PEERS = {"stage0": "bare", "stage2": "bare", "averages": "stage2", "looked": "stage2"}
"""Variant, and the one to compare with."""
UPLOAD_EVERY = 10
WARM_UP, STEPS = 3, 15


def small_flow() -> Flow:
    """The flow of the variants."""
    torch.manual_seed(0)
    return build(MODEL, SHAPE, CLASSES).train()


def batch_of(shape: tuple[int, int, int], num: int, classes: int | None, device: str) -> tuple[Tensor, Tensor | None]:
    """Synthetic images and labels."""
    x = torch.rand(num, *shape, device=device) * 2 - 1
    return x, None if classes is None else torch.arange(num, device=device) % classes


def bare_step() -> Callable[[], Any]:
    """A training step in plain PyTorch."""
    flow = small_flow()
    optimizer = torch.optim.AdamW(flow.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=1e-4, fused=True)
    batch = batch_of(SHAPE, BATCH, CLASSES, "cpu")

    def step() -> float:
        z, log_det = flow(*batch)
        loss = -(standard_normal_log_prob(z) + log_det).mean() / flow.num_dims
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())

    return step


def engine_of(stage: int) -> Engine:
    """Our engine with the same model and optimizer."""
    device = start_process_group(threads=1)
    training = TrainingConfig(total_images=1, global_batch_size=BATCH, micro_batch_size=BATCH)
    parallelism = ParallelismConfig.model_validate({"zero_stage": stage})
    objective = FlowObjective(small_flow(), conditional=True, label_drop=0.0)
    return Engine(objective, device, OptimizerConfig(), training, parallelism)


def timed(step: Callable[[], Any]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def overheads(rounds: int) -> dict[str, Figure]:
    """Everything but utilisation."""
    torch.set_num_threads(1)
    engines = {name: engine_of(0 if name == "stage0" else 2) for name in PEERS}
    batch = batch_of(SHAPE, BATCH, CLASSES, "cpu")
    averages = WeightAverages(engines["averages"], (1000, 10_000))

    def step_of(engine: Engine) -> Callable[[], Any]:
        return lambda: engine.step([batch], 1.0)

    def step_with_averages() -> None:
        engines["averages"].step([batch], 1.0)
        averages.update(10**6, BATCH)

    steps = {"bare": bare_step()} | {name: step_of(engine) for name, engine in engines.items()}
    steps["averages"] = step_with_averages
    for step in steps.values():
        for _ in range(WARM_UP):
            step()
    with engines["looked"].borrowing(WeightAverages(engines["looked"], (1000,)).full()):
        engines["looked"].figures(batch)

    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds):
        names = list(steps)
        for name in random.Random(number).sample(names, len(names)):
            seconds[name].append(timed(steps[name]))
        print(f"round {number + 1}: " + ", ".join(f"{n} {s[-1]:.3f} s" for n, s in seconds.items()), file=sys.stderr)
    ratios = {name: median_ratio(seconds[name], seconds[peer]) for name, peer in PEERS.items()}
    held = averages.num_bytes / engines["averages"].num_parameters / len(averages.half_lives)
    return {
        "engine_stage_0_over_bare": ("<= 1.05", ratios["stage0"], "times"),
        "engine_stage_2_over_bare": ("<= 1.05", ratios["stage2"], "times"),
        "two_averages_over_none": ("", ratios["averages"], "times"),
        "step_after_validation_over_before": ("<= 1.05", ratios["looked"], "times"),
        **uploads(engines["averages"], averages, step_of(engines["averages"]), max(2, rounds // UPLOAD_EVERY)),
        "average_bytes_per_parameter": ("<= 4", held, "bytes"),
        **{f"step_{name}": ("", statistics.median(value), "s") for name, value in seconds.items()},
    }


def median_ratio(these: Sequence[float], those: Sequence[float]) -> float:
    """Median of the quotients of pairs."""
    return statistics.median(a / b for a, b in zip(these, those, strict=True))


def uploads(engine: Engine, averages: WeightAverages, step: Callable[[], Any], rounds: int) -> dict[str, Figure]:
    """How long a checkpoint stops training, and how much its upload slows down steps."""
    state = TrainState(
        images_seen=1, num_steps=1, skipped_steps=0, skipped_in_a_row=0, loss_sum=0.0, loss_steps=0, seconds=0.0, run={}
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as top:
        config = CheckpointConfig(every_images=1, upload_path=f"{top}/store")
        started = time.perf_counter()
        saved, files = checkpoint.save(f"{top}/own", engine, averages, state, config)
        stall = time.perf_counter() - started
        size = sum((Path(saved) / file).stat().st_size for file in files)
        uploader = Uploader(config)
        busy: list[float] = []
        intervals: tuple[list[float], list[float]] = ([], [])
        for number in range(2 * rounds):
            uploading = (number % 2 == 0) != (number % 4 < 2)  # off, on, on, off: a drift of the machine cancels
            seconds: list[float] = []
            if uploading:
                shutil.rmtree(f"{top}/store", ignore_errors=True)
                uploader.start(saved, files)
            for _ in range(UPLOAD_EVERY):
                during = uploader.busy
                seconds.append(timed(step))
                busy += seconds[-1:] if during else []
            uploader.wait()
            intervals[uploading].append(sum(seconds))
    free = statistics.median(intervals[False]) / UPLOAD_EVERY
    return {
        "upload_over_none_per_checkpoint": ("<= 1.05", median_ratio(intervals[True], intervals[False]), "times"),
        "step_during_upload_over_without": ("", statistics.median(busy) / free, "times"),
        "checkpoint_stall": ("", stall, "s"),
        "checkpoint_megabytes": ("", size / 1e6, "MB"),
        "checkpoint_bytes_per_parameter": ("", (size - 1e4) / engine.num_parameters, "bytes"),
    }


def median_seconds(step: Callable[[], Any], device: str = "cpu", steps: int = STEPS) -> float:
    """The median of some steps after warm-up steps."""
    seconds: list[float] = []
    for number in range(WARM_UP + steps):
        synchronize(device)
        started = time.perf_counter()
        step()
        synchronize(device)
        if number >= WARM_UP:
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def utilisation(arguments: argparse.Namespace) -> dict[str, Figure]:
    """Speed of a configuration's step on one device, of synthetic images."""
    config = TrainConfig.load(arguments.config, arguments.overrides)
    model = config.model
    if not isinstance(model, FlowConfig):
        raise ConfigError(f"this benchmark measures flows (got model.kind={model.kind}); name the recipe of a flow")
    shape = (arguments.channels, arguments.pixels, arguments.pixels)
    device = start_process_group(threads=config.training.threads)
    size = config.training.micro_batch_size
    training = config.training.model_copy(update={"global_batch_size": size})  # of one rank, without accumulation
    torch.manual_seed(0)
    with device:
        flow = build(model, shape, arguments.classes)
    batch = batch_of(shape, size, flow.num_classes, device.type)
    flow.initialize(*batch)
    flow.activations = config.parallelism.activations
    objective = FlowObjective(flow, flow.num_classes is not None, 0.0)
    engine = Engine(objective, device, config.optimizer, training, config.parallelism)
    averages = WeightAverages(engine, training.ema_half_life_images)

    def step() -> None:
        engine.step([batch], 1.0)
        averages.update(10**6, size)

    seconds = median_seconds(step, device.type, arguments.steps)
    dtype = torch.bfloat16 if config.parallelism.precision == "bf16" else torch.float32
    peak = arguments.peak_flops or peak_flops_of(device) or matmul_flops(device.type, dtype)
    rate, tokens = size / seconds, tokens_per_image(model, shape)
    figures: dict[str, Figure] = {
        "images_per_second": ("", rate, "images/s"),
        "mfu": (">= 0.4 on an H200", rate * training_flops(model, shape) / peak, "of the peak"),
        "peak": ("", peak / 1e12, "TFLOP/s"),
        "peak_memory": ("", peak_memory_bytes(device.type) / 2**30, "GiB"),
    }
    if tokens:
        figures["tokens_per_second"] = ("", rate * tokens, "tokens/s")
    return figures


def matmul_flops(device: str, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product: the peak of a device without a known data sheet."""
    size = 8192 if device == "cuda" else 1536
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / median_seconds(lambda: a @ b, device)


def main() -> None:
    """Measure all variants, or a configuration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40, help="steps of each variant")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--config", type=Path, help="measure a step of this configuration")
    parser.add_argument("--pixels", type=int, default=64, help="side of its images")
    parser.add_argument("--channels", type=int, default=3)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--peak-flops", type=float, help="of the device; default: known, or measured")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_args()
    figures = utilisation(arguments) if arguments.config else overheads(arguments.rounds)
    if arguments.output:
        device = "cuda" if arguments.config and torch.cuda.is_available() else "cpu"
        write_results(arguments.output, device, figures, rounds=arguments.rounds)
    else:
        print(
            "\n".join(
                f"{name}: {got:.4g} {unit} (asked: {asked or 'no'})" for name, (asked, got, unit) in figures.items()
            )
        )
    leave(0)


if __name__ == "__main__":
    main()
