"""What the ranks of the distributed tests run: ``torchrun -m tests.training.workers CASE OUTPUT [ARGUMENT ...]``.

Rank 0 writes its findings to OUTPUT as JSON.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from tarflow_scale import distributed
from tarflow_scale.config import GlowConfig, OptimizerConfig, ParallelismConfig, TarFlowConfig, TrainingConfig
from tarflow_scale.errors import UserError
from tarflow_scale.flows import Flow, build
from tarflow_scale.training import checkpoint
from tarflow_scale.training.checkpoint import TrainState
from tarflow_scale.training.ema import WeightAverage
from tarflow_scale.training.engine import Engine, MicroBatch, StepResult, start_process_group
from tarflow_scale.training.loop import check_shared
from tarflow_scale.training.schedule import average_decay
from tests.flows.catalogue import moved

BATCH = 12
RATE = 1e-2
HALF_LIFE = 60
UNEVEN = {1: (12,), 2: (7, 5), 3: (8, 4, 0)}
"""Images of each rank in the initialisation of ActNorm, by the number of ranks."""


def small_flow() -> Flow:
    torch.manual_seed(0)
    config = TarFlowConfig(kind="tarflow", patch_size=2, width=16, head_width=8, layers_per_block=(1, 1))
    return build(config, (1, 4, 4), 3)


def small_glow() -> Flow:
    """A fresh Glow, initialised on the first global batch, of which each rank has an uneven part."""
    torch.manual_seed(0)
    config = GlowConfig(kind="glow", levels=2, steps_per_level=3, width=8)
    flow = build(config, (1, 4, 4), 3)
    x, y = global_batch(0)
    sizes = UNEVEN[distributed.world_size()]
    start = sum(sizes[: distributed.rank()])
    own = slice(start, start + sizes[distributed.rank()])
    flow.initialize(x[own], y[own])
    return flow


def small_engine(
    stage: int, device: torch.device, accumulation: int = 1, flow: Flow | None = None, precision: str = "fp32"
) -> Engine:
    micro = BATCH // distributed.world_size() // accumulation
    training = TrainingConfig(total_images=1, global_batch_size=BATCH, micro_batch_size=micro)
    parallelism = ParallelismConfig.model_validate({"zero_stage": stage, "precision": precision})
    return Engine(flow or small_flow(), device, OptimizerConfig(gradient_clip_norm=0.5), training, parallelism)


def global_batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return 0.3 * torch.randn(BATCH, 1, 4, 4, generator=generator), torch.arange(BATCH) % 3


def step_on(engine: Engine, step: int, poison: float = 0.0) -> StepResult:
    """One step on this rank's part; ``poison`` is added to one pixel of the last rank's."""
    x, y = global_batch(step)
    x[-1, 0, 0, 0] += poison
    share = BATCH // distributed.world_size()
    own = slice(distributed.rank() * share, (distributed.rank() + 1) * share)
    parts = engine.num_micro_batches
    micro = [MicroBatch(a, b) for a, b in zip(x[own].chunk(parts), y[own].chunk(parts), strict=True)]
    return engine.step(micro, RATE)


def mean_loss(result: StepResult) -> float:
    return float(distributed.all_reduce_sum(torch.tensor([result.nats_per_dim], dtype=torch.float64))) / (
        distributed.world_size()
    )


def case_curve(device: torch.device, stage: str, steps: str, accumulation: str = "1") -> dict[str, Any]:
    """Loss curve, and the moving average against a plain one computed from gathered weights."""
    engine = small_engine(int(stage), device, int(accumulation))
    average = WeightAverage(engine, HALF_LIFE)
    plain = {name: engine.full_weight(name).clone() for name in engine.names}
    losses, norms = [], []
    for step in range(int(steps)):
        result = step_on(engine, step)
        losses.append(mean_loss(result))
        norms.append(result.gradient_norm)
        seen = (step + 1) * BATCH
        average.update(seen, BATCH)
        decay = average_decay(seen, BATCH, HALF_LIFE)
        for name in engine.names:
            plain[name].lerp_(engine.full_weight(name), 1 - decay)
    error = max(float((full - plain[name]).abs().max()) for name, full in average.full())
    return {"losses": losses, "norms": norms, "average_error": error, "num_steps": engine.num_steps}


def case_save(device: torch.device, stage: str, folder: str) -> dict[str, Any]:
    """Train 6 steps, save, train 6 more; the losses of the latter."""
    engine = small_engine(int(stage), device)
    average = WeightAverage(engine, HALF_LIFE)
    for step in range(6):
        step_on(engine, step)
        average.update((step + 1) * BATCH, BATCH)
    state = TrainState(
        images_seen=6 * BATCH,
        num_steps=engine.num_steps,
        skipped_steps=0,
        skipped_in_a_row=0,
        loss_sum=0.0,
        loss_steps=0,
        seconds=0.0,
        run={},
    )
    checkpoint.save(folder, engine, average, state, keep_last=2)
    return _continue(engine, average)


def case_load(device: torch.device, stage: str, folder: str) -> dict[str, Any]:
    """Load what ``case_save`` saved, on other ranks or at another stage, and train the same 6 steps."""
    engine = small_engine(int(stage), device)
    average = WeightAverage(engine, HALF_LIFE)
    found = checkpoint.find_latest(folder)
    assert found is not None
    checkpoint.load(found[0], engine, average, prime=lambda: step_on(engine, 99))
    return _continue(engine, average)


def _continue(engine: Engine, average: WeightAverage) -> dict[str, Any]:
    losses = []
    for step in range(6, 12):
        losses.append(mean_loss(step_on(engine, step)))
        average.update((step + 1) * BATCH, BATCH)
    total = sum(float(full.double().sum()) for _, full in average.full())
    return {"losses": losses, "average_sum": total}


def case_poison(device: torch.device, stage: str) -> dict[str, Any]:
    """A batch with a NaN on one rank must change nothing on any rank."""
    engine = small_engine(int(stage), device)
    step_on(engine, 0)
    before = {name: engine.full_weight(name).clone() for name in engine.names}
    result = step_on(engine, 1, poison=float("nan"))
    unchanged = all(torch.equal(before[name], engine.full_weight(name)) for name in engine.names)
    after = step_on(engine, 2)
    moved = any(not torch.equal(before[name], engine.full_weight(name)) for name in engine.names)
    return {
        "skipped": result.skipped,
        "unchanged": unchanged,
        "next_skipped": after.skipped,
        "moved": moved,
        "finite": all(bool(torch.isfinite(engine.full_weight(name)).all()) for name in engine.names),
    }


def case_glow(device: torch.device, steps: str, *variants: str) -> dict[str, Any]:
    """Loss curves by ``stage:activations:precision[:tarflow]``, and how the Glow was initialised."""
    flow = small_glow()
    statistics = {name: value.float().tolist() for name, value in flow.state_dict().items() if ".norm" in name}
    digests: list[Any] = [None] * distributed.world_size()
    torch.distributed.all_gather_object(digests, [tensor.numpy().tobytes() for tensor in flow.state_dict().values()])
    curves: dict[str, Any] = {}
    for variant in variants:
        stage, activations, precision, *other = variant.split(":")
        flow = small_flow() if other else small_glow()
        moved(flow, ("",))  # at the start most gradients are rounding errors, which Adam makes as large as any
        flow.activations = activations  # type: ignore[assignment]
        engine = small_engine(int(stage), device, flow=flow, precision=precision)
        results = [step_on(engine, 0) for _ in range(int(steps))]
        assert all(bool(value) for name, value in engine.buffers().items() if name.endswith("initialized"))
        curves[variant] = {
            "losses": [mean_loss(result) for result in results],
            "norms": [result.gradient_norm for result in results],
            "released": sum(parameter.numel() == 0 for parameter in flow.parameters()),
        }
    return {"statistics": statistics, "ranks_are_equal": all(one == digests[0] for one in digests), "curves": curves}


def case_shared(device: torch.device, folder: str) -> dict[str, Any]:
    """One folder for all ranks is fine; one for each is refused by all."""
    check_shared(folder, device)
    try:
        check_shared(f"{folder}/{distributed.rank()}", device)
        refused = ""
    except UserError as error:
        refused = str(error)
    ranks = distributed.all_reduce_sum(torch.tensor([float(bool(refused))]))
    left = [str(path) for path in Path(folder).rglob("*") if path.is_file()]
    return {"refused": refused, "ranks": float(ranks), "left": left}


def main() -> None:
    case, output, *arguments = sys.argv[1:]
    device = start_process_group(threads=1)
    found = globals()[f"case_{case}"](device, *arguments)
    if distributed.is_main():
        Path(output).write_text(json.dumps(found))
    distributed.barrier()
    distributed.shut_down()


if __name__ == "__main__":
    main()
