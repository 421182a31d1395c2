"""What the ranks of the distributed tests run: ``torchrun -m tests.training.workers``, and one case after the other.

Rank 0 reads the cases from standard input, one a line, as a JSON list of the name and the arguments, and answers with a
line of `RESULT` and JSON. A variant is written ``stage=2,flow=glow,activations=rebuild``; see `Variant`.
"""

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tarflow_scale.autoencoders.stored import build_autoencoder
from tarflow_scale.config.autoencoder import ConvolutionalConfig
from tarflow_scale.config.model import (
    ContinuousConfig,
    DequantizationConfig,
    GlowConfig,
    IAFConfig,
    MAFConfig,
    ModelConfig,
    NICEConfig,
    RealNVPConfig,
    TarFlowConfig,
)
from tarflow_scale.config.parallelism import ParallelismConfig
from tarflow_scale.config.train import CheckpointConfig, OptimizerConfig, TrainingConfig
from tarflow_scale.errors import UserError
from tarflow_scale.flows import Flow, build
from tarflow_scale.records import PixelFormat
from tarflow_scale.runtime import distributed
from tarflow_scale.runtime.processes import leave
from tarflow_scale.shards.reader import Batch
from tarflow_scale.training import checkpoint
from tarflow_scale.training.checkpoint import TrainState
from tarflow_scale.training.ema import WeightAverages
from tarflow_scale.training.engine import Engine, StepResult, start_process_group
from tarflow_scale.training.folder import check_shared
from tarflow_scale.training.objective import FlowObjective, MicroBatch, Objective
from tarflow_scale.training.reconstruction import ReconstructionObjective
from tarflow_scale.training.schedule import average_decay
from tests.flows.catalogue import STARFLOW, moved

RESULT = "result: "
BATCH = 12
HALF_LIVES = (60, 240)
UNEVEN = {1: (12,), 2: (7, 5), 3: (8, 4, 0)}
"""Images of each rank in the initialisation of ActNorm, by the number of ranks."""


CONFIGS: dict[str, ModelConfig] = {
    "tarflow": TarFlowConfig(patch_size=2, width=16, head_width=8, layers_per_block=(1, 1)),
    "starflow": TarFlowConfig.model_validate({"patch_size": 2, "layers_per_block": (1, 1)} | STARFLOW),
    "glow": GlowConfig(levels=2, steps_per_level=3, width=8),
    "realnvp": RealNVPConfig(levels=2, width=8, residual_blocks=1, normalization="batch"),
    "nice": NICEConfig(width=16, hidden_layers=2),
    "maf": MAFConfig(transforms=2, hidden_widths=(24,)),
    "iaf": IAFConfig(transforms=2, hidden_widths=(24,)),
    "learned_noise": NICEConfig(width=16, hidden_layers=2, dequantization=DequantizationConfig(couplings=2, width=6)),
    "continuous": ContinuousConfig(width=6, hidden_layers=1, tolerance=1e-7),
}
AUTOENCODER = ConvolutionalConfig(num_channels=1, factor=2, latent_channels=2, width=8, blocks=1, kl_weight=0.5)
AUTOENCODERS = "autoencoder", "decoder"
"""Values of ``flow`` that are not flows: an autoencoder, or only its decoder."""


@dataclass
class Variant:
    """One way to train the same small flow."""

    stage: int = 0
    flow: str = "tarflow"
    activations: str = "keep"
    precision: str = "fp32"
    accumulation: int = 1
    offload: str = "none"
    optimizer: str = "adamw"
    compile: bool = False

    @classmethod
    def parse(cls, text: str) -> "Variant":
        words = dict(word.split("=") for word in text.split(","))
        numbers = {key: int(value) for key, value in words.items() if value.isdigit()}
        return cls(**(words | numbers))  # type: ignore[arg-type]


def small_flow(kind: str) -> Flow:
    """Freshly initialised on the first global batch, of which each rank has an uneven part."""
    torch.manual_seed(0)
    flow = build(CONFIGS[kind], (1, 4, 4), 3)
    flow.pixels = PixelFormat(bit_depth=3, noise="uniform")
    x, y = global_batch(0)
    sizes = UNEVEN[distributed.world_size()]
    start = sum(sizes[: distributed.rank()])
    own = slice(start, start + sizes[distributed.rank()])
    flow.initialize(x[own], y[own])
    return flow


def small_objective(variant: Variant) -> Objective[Any]:
    if variant.flow in AUTOENCODERS:
        torch.manual_seed(0)
        only_decoder = variant.flow == "decoder"
        autoencoder = build_autoencoder(AUTOENCODER)
        moved(autoencoder, ("",))
        weight = None if only_decoder else AUTOENCODER.weight_of_kl
        return ReconstructionObjective(autoencoder, (1, 4, 4), 8, weight, 0.2 if only_decoder else 0.0)
    flow = small_flow(variant.flow)
    if variant.flow != "tarflow":
        moved(flow, ("",))  # at the start most gradients are rounding errors, which Adam makes as large as any
    flow.activations = variant.activations  # type: ignore[assignment]
    penalty = 1e-2 if variant.flow == "starflow" else 0.0
    return FlowObjective(flow, conditional=True, label_drop=0.0, latent_norm_weight=penalty)


def small_engine(variant: Variant, device: torch.device) -> Engine:
    objective = small_objective(variant)
    micro = BATCH // distributed.world_size() // variant.accumulation
    training = TrainingConfig(total_images=1, global_batch_size=BATCH, micro_batch_size=micro)
    parallelism = ParallelismConfig.model_validate(
        {
            "zero_stage": variant.stage,
            "precision": variant.precision,
            "offload": variant.offload,
            "compile": variant.compile,
        }
    )
    if variant.optimizer == "muon":
        optimizer = OptimizerConfig(kind="muon", peak_lr=3e-3, muon_peak_lr=2e-2)
    else:
        optimizer = OptimizerConfig(peak_lr=1e-2, gradient_clip_norm=0.5)
    return Engine(objective, device, optimizer, training, parallelism)


def global_batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return 0.3 * torch.randn(BATCH, 1, 4, 4, generator=generator), torch.arange(BATCH) % 3


def images_and_noise(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same batch for an autoencoder."""
    x, _ = global_batch(step)
    noise = torch.randn(BATCH, 2, 2, 2, generator=torch.Generator().manual_seed(step))
    return (127.5 * (x.clamp(-1, 1) + 1)).to(torch.uint8), noise


def own_part(engine: Engine, step: int, poison: float = 0.0) -> list[MicroBatch]:
    """This rank's part of a global batch; ``poison`` is added to one number of the last rank's."""
    if isinstance(engine.objective, ReconstructionObjective):
        x, y = images_and_noise(step)
        y[-1, 0, 0, 0] += poison
    else:
        x, y = global_batch(step)
        x[-1, 0, 0, 0] += poison
    share = BATCH // distributed.world_size()
    own = slice(distributed.rank() * share, (distributed.rank() + 1) * share)
    parts = engine.num_micro_batches
    return list(zip(x[own].chunk(parts), y[own].chunk(parts), strict=True))


def step_on(
    engine: Engine, step: int, poison: float = 0.0, reject: Callable[[float], bool] | None = None
) -> StepResult:
    return engine.step(own_part(engine, step, poison), 1.0, reject)


def mean_over_ranks(value: float) -> float:
    return float(distributed.all_reduce_sum(torch.tensor([value], dtype=torch.float64))) / distributed.world_size()


def case_curves(device: torch.device, steps: str, *variants: str) -> dict[str, Any]:
    """Loss curves by variant, and the moving averages against plain ones computed from gathered weights."""
    return {text: _curve(device, int(steps), Variant.parse(text)) for text in variants}


def _curve(device: torch.device, steps: int, variant: Variant) -> dict[str, Any]:
    engine = small_engine(variant, device)
    averages = WeightAverages(engine, HALF_LIVES)
    plain = {half_life: {name: engine.full_weight(name).clone() for name in engine.names} for half_life in HALF_LIVES}
    losses, norms = [], []
    released = 0
    for step in range(steps):
        torch.manual_seed(step)  # probes of a continuous flow
        result = step_on(engine, step)
        released = sum(parameter.numel() == 0 for parameter in engine._parameters.values())
        losses.append(mean_over_ranks(result.values[0]))
        norms.append(result.gradient_norm)
        seen = (step + 1) * BATCH
        averages.update(seen, BATCH)
        weights = {name: engine.full_weight(name) for name in engine.names}
        for half_life, names in plain.items():
            for name, value in names.items():
                value.lerp_(weights[name], 1 - average_decay(seen, BATCH, half_life))
    return {
        "losses": losses,
        "norms": norms,
        "num_steps": engine.num_steps,
        "frozen": _frozen(engine),
        "released": released,
        "initialized": all(bool(value) for name, value in engine.buffers().items() if name.endswith("initialized")),
        "average_bytes": distributed.gather(averages.num_bytes),
        "parameters": engine.num_parameters,
        "average_errors": [
            max(
                float((full.cpu() - plain[half_life][name].cpu()).abs().max())
                for name, full in averages.full(half_life)
            )
            for half_life in HALF_LIVES
        ],
    }


def _frozen(engine: Engine) -> str:
    """Digest of the weights that are not trained."""
    frozen = {name: weight for name, weight in engine.objective.named_parameters() if not weight.requires_grad}
    if engine.stage == 3:
        return ""
    return hashlib.sha256(b"".join(weight.numpy().tobytes() for weight in frozen.values())).hexdigest()


def case_statistics(device: torch.device) -> dict[str, Any]:
    """How a Glow was initialised on ranks with uneven parts of the batch."""
    flow = small_flow("glow")
    statistics = {name: value.float().tolist() for name, value in flow.state_dict().items() if ".norm" in name}
    digests = distributed.gather([tensor.numpy().tobytes() for tensor in flow.state_dict().values()])
    return {"statistics": statistics, "ranks_are_equal": all(one == digests[0] for one in digests)}


def case_scales(device: torch.device) -> dict[str, Any]:
    """The measured scales of the latents of a batch of which each rank has a part."""
    objective = small_objective(Variant(flow="decoder"))
    assert isinstance(objective, ReconstructionObjective)
    share = BATCH // distributed.world_size()
    own = slice(distributed.rank() * share, (distributed.rank() + 1) * share)
    numbers = np.arange(BATCH)
    batch = Batch(images_and_noise(0)[0].numpy(), numbers, numbers, 0 * numbers)
    objective.initialize(batch[own], 4, 0, device)
    return {"scales": objective.latent_scale.tolist()}


def case_unequal(device: torch.device) -> dict[str, Any]:
    """An engine must not start where a rank has other weights, or another buffer."""
    refused = []
    for name in ("blocks.0.proj_in.weight", "levels.0.steps.0.norm.initialized"):
        flow = small_flow("tarflow" if name.startswith("blocks") else "glow")
        if distributed.rank() == 1:
            tensor = flow.state_dict()[name]
            tensor.view(-1)[0] = not bool(tensor.view(-1)[0])
        try:
            distributed.check_equal(flow)
            refused.append("")
        except RuntimeError as error:
            refused.append(str(error))
    return {"refused": distributed.gather(refused)}


def state_after(steps: int, engine: Engine) -> TrainState:
    return TrainState(
        images_seen=steps * BATCH,
        num_steps=engine.num_steps,
        skipped_steps=0,
        skipped_in_a_row=0,
        loss_sum=0.0,
        loss_steps=0,
        seconds=0.0,
        run={},
    )


def case_save(device: torch.device, folder: str, *variants: str) -> dict[str, Any]:
    """Train 6 steps, save, train 6 more; the losses of the latter."""
    found = {}
    for text in variants:
        engine = small_engine(Variant.parse(text), device)
        averages = WeightAverages(engine, HALF_LIVES)
        for step in range(6):
            step_on(engine, step)
            averages.update((step + 1) * BATCH, BATCH)
        checkpoint.save(f"{folder}/{text}", engine, averages, state_after(6, engine), CheckpointConfig(every_images=1))
        found[text] = _continue(engine, averages)
    return found


def case_load(device: torch.device, folder: str, *pairs: str) -> dict[str, Any]:
    """Load what ``case_save`` saved, on other ranks or at another stage, and train the same 6 steps."""
    found = {}
    for pair in pairs:
        saved, text = pair.split(":")
        engine = small_engine(Variant.parse(text), device)
        averages = WeightAverages(engine, HALF_LIVES)
        latest = checkpoint.find_latest(f"{folder}/{saved}")
        assert latest is not None
        checkpoint.load(latest[0], engine, averages, prime=lambda engine=engine: step_on(engine, 99))
        found[pair] = _continue(engine, averages)
    return found


def _continue(engine: Engine, averages: WeightAverages) -> dict[str, Any]:
    losses = []
    for step in range(6, 12):
        losses.append(mean_over_ranks(step_on(engine, step).values[0]))
        averages.update((step + 1) * BATCH, BATCH)
    sums = [sum(float(full.double().sum()) for _, full in averages.full(half_life)) for half_life in HALF_LIVES]
    return {"losses": losses, "average_sums": sums}


def case_poison(device: torch.device, *variants: str) -> dict[str, Any]:
    """A batch with a NaN on one rank, or a rejected step, must change nothing on any rank."""
    found = {}
    for text in variants:
        engine = small_engine(Variant.parse(text), device)
        step_on(engine, 0)
        before = _everything(engine)
        result = step_on(engine, 1, poison=float("nan"))
        unchanged = _same(before, _everything(engine))
        asked: list[float] = []
        rejected = step_on(engine, 1, reject=lambda loss, asked=asked: not asked.append(loss))
        held = _same(before, _everything(engine))
        after = step_on(engine, 2, reject=lambda loss: False)
        now = _everything(engine)
        found[text] = {
            "skipped": result.skipped,
            "unchanged": unchanged,
            "rejected": rejected.rejected and rejected.skipped and not result.rejected,
            "unchanged_by_rejection": held,
            "asked_with_the_mean": abs(asked[0] - mean_over_ranks(rejected.values[0])) < 1e-6,
            "next_skipped": after.skipped,
            "moved": not _same(before, now),
            "finite": all(bool(torch.isfinite(value).all()) for value in now.values()),
        }
    return found


def _everything(engine: Engine) -> dict[str, torch.Tensor]:
    weights = {name: engine.full_weight(name).clone() for name in engine.names}
    moments = {
        f"{moment}/{name}": engine.full_moment(name, moment).clone()
        for name in engine.names
        if engine.has_moments(name)
        for moment in checkpoint.MOMENTS
    }
    momenta = {f"momentum/{name}": value.clone() for name, value in engine.momenta().items()}
    return weights | moments | momenta | {f"buffer/{name}": value.clone() for name, value in engine.buffers().items()}


def _same(before: dict[str, torch.Tensor], now: dict[str, torch.Tensor]) -> bool:
    return before.keys() == now.keys() and all(torch.equal(value, now[name]) for name, value in before.items())


def case_borrowed(device: torch.device, *variants: str) -> dict[str, Any]:
    """Looking at averaged weights must not be seen by training; and sees what a copy of them would."""
    found = {}
    for text in variants:
        variant = Variant.parse(text)
        curves = []
        for looks in (False, True):
            engine = small_engine(variant, device)
            averages = WeightAverages(engine, HALF_LIVES)
            losses, seen = [], 0.0
            for step in range(5):
                losses.append(mean_over_ranks(step_on(engine, step).values[0]))
                averages.update((step + 1) * BATCH, BATCH)
                if looks:
                    with engine.borrowing(averages.full()):
                        seen = float(engine.figures(global_batch(50)).sum())
            curves.append(losses)
        copy = small_flow(variant.flow).eval()
        weights = dict(averages.full()) | engine.buffers()
        copy.load_state_dict({name: value.clone() for name, value in weights.items()})
        with torch.no_grad():
            expected = -float(copy.log_prob(*global_batch(50)).sum())
        found[text] = {"equal": curves[0] == curves[1], "seen": seen, "expected": expected}
    return found


def case_shared(device: torch.device, folder: str) -> dict[str, Any]:
    """One folder for all ranks is fine; one for each is refused by all."""
    check_shared(folder, device)
    try:
        check_shared(f"{folder}/{distributed.rank()}", device)
        refused = ""
    except UserError as error:
        refused = str(error)
    left = [str(path) for path in Path(folder).rglob("*") if path.is_file()]
    return {"refused": distributed.gather(refused), "left": left}


def main() -> None:
    device = start_process_group(threads=1)
    while request := distributed.from_main(sys.stdin.readline):
        case, *arguments = json.loads(request)
        outcome = globals()[f"case_{case}"](device, *arguments)
        if distributed.is_main():
            print(f"{RESULT}{json.dumps(outcome)}", flush=True)
    distributed.shut_down()
    leave(0)


if __name__ == "__main__":
    main()
