"""Estimate the peak memory of a rank, part by part, from the configuration.

The following memory stays allocated, in bytes per parameter, with N ranks and E moving averages. Masters are the copies
of weights that the optimizer updates. The numbers follow the behaviour of DeepSpeed 0.19.8 and, with fp32 weights,
section 3 of Rajbhandari et al., "ZeRO", arXiv 1910.02054.

    stage 0     weights 4, moments 8, averages 4 E / N
    stage 1, 2  weights 4, masters 4 / N, moments 8 / N, averages 4 E / N
    stage 3     weights 4 / N, masters 4 / N, moments 8 / N, averages 4 E / N, gradients 4 / N, a bucket

Other memory is temporary. A step has four phases, which allocate different parts of it; the largest phase is the peak:

    forward     activations saved for the backward pass, weights in bf16, and at stage 3 gathered weights (DeepSpeed
                keeps up to a billion of them until the backward pass) and the weights that are being prefetched
    backward    the same except prefetched weights, plus gradients of one unit, plus (stages 1, 2) reduction buckets
    reduction   gradients (stage 0: all; stage 1: all if they accumulate or if reductions do not overlap with the
                backward pass, otherwise this rank's; stage 2: this rank's), the buckets, and a contiguous copy to send
    update      this rank's gradients, and a contiguous copy of them

Gradients are freed after each step, so all gradients and all activations are in memory together only if gradients
accumulate. Muon has one moment and a copy of it, which is restored if a step is rejected. With bf16 autocast the
gradients of linear layers and convolutions are sent in bf16, in separate buckets. A GPU has two buckets, so that
reductions overlap with the backward pass. A CPU has one; its pages take no memory until they are written. The measured
memory of processes is in ``evals/results/capacity-cpu.json``.
"""

from dataclasses import dataclass, fields
from typing import Literal

from tarflow_scale.capacity.activations import Footprint, activation_footprint
from tarflow_scale.config.autoencoder import TunedDecoderConfig
from tarflow_scale.config.parallelism import ParallelismConfig
from tarflow_scale.config.train import Recipe

__all__ = ["BUCKET_ELEMENTS", "LIVE_ELEMENTS", "Memory", "ModelSize", "Ranks", "memory_of", "memory_per_rank"]

BUCKET_ELEMENTS = 50_000_000
"""Size of a bucket: number of elements that are reduced or gathered together."""
LIVE_ELEMENTS = 1_000_000_000
"""Maximum number of weights that stage 3 keeps gathered between two uses; DeepSpeed's default."""
_STAGE_0_ELEMENTS = 500_000_000
"""Number of elements that DeepSpeed reduces together at stage 0."""
_CUDA_CONTEXT_BYTES = 1.5e9
"""CUDA context, kernels, NCCL channels and cuBLAS workspace; an assumption, not measured."""

Stage = Literal[0, 1, 2, 3]


@dataclass(frozen=True)
class ModelSize:
    """Number of parameters of a flow.

    Args:
        parameters: number of all parameters.
        low_precision: number of parameters of plain linear layers and convolutions. bf16 autocast casts them, and
            DeepSpeed sends their gradients in bf16.
    """

    parameters: int
    low_precision: int = 0


@dataclass(frozen=True)
class Ranks:
    """Number and kind of the ranks of a run.

    Args:
        num: number of ranks.
        accumulates: whether a rank processes several micro batches per step.
        cuda: whether the ranks are GPUs.
    """

    num: int
    accumulates: bool
    cuda: bool


@dataclass(frozen=True)
class Memory:
    """Memory of a rank in a phase of a step, in bytes; ``in_main`` is in main memory, the rest on the device."""

    phase: Literal["forward", "backward", "reduction", "update"]
    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    averages: float = 0.0
    activations: float = 0.0
    buffers: float = 0.0
    context: float = 0.0
    in_main: float = 0.0

    @property
    def total(self) -> float:
        """Bytes on the device."""
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, float]:
        """Bytes of each part on the device, by name."""
        return {part.name: getattr(self, part.name) for part in fields(self) if part.name not in ("phase", "in_main")}


def memory_of(
    size: ModelSize, footprint: Footprint, parallelism: ParallelismConfig, num_averages: int, ranks: Ranks
) -> Memory:
    """Peak memory of a rank.

    Args:
        size: number of parameters of the flow.
        footprint: activations of one micro batch.
        parallelism: the section ``parallelism``.
        num_averages: number of moving averages.
        ranks: number and kind of ranks.
    """
    parameters, share = float(size.parameters), 1 / ranks.num
    stage: Stage = parallelism.zero_stage
    divided = 1.0 if stage == 0 else share
    weights = 4 * parameters * (share if stage == 3 else 1)
    masters = 0.0 if stage == 0 else 4 * parameters * share
    moments = 8 * parameters * divided
    averages = 4 * parameters * num_averages * share
    partition = 4 * parameters * share if stage == 3 else 0.0
    bucket = _Buckets.of(size, stage, parallelism.precision == "bf16", ranks.cuda)
    in_main = 0.0
    if parallelism.offload != "none":  # gradients too, because the CPU updates the weights
        in_main = masters + moments + averages + 4 * parameters * share
        masters = moments = averages = partition = 0.0
    if parallelism.offload == "all":
        in_main, weights = in_main + weights, 0.0
    worst = max(_phases(size, footprint, parallelism, ranks, bucket), key=lambda phase: phase.total)
    return Memory(
        worst.phase,
        weights=weights + worst.weights,
        gradients=partition + worst.gradients,
        optimizer=masters + moments,
        averages=averages,
        activations=worst.activations,
        buffers=bucket.always + worst.buffers,
        context=_CUDA_CONTEXT_BYTES if ranks.cuda else 0.0,
        in_main=in_main,
    )


@dataclass(frozen=True)
class _Buckets:
    """Sizes of the communication buffers on a rank, in bytes.

    always: buckets that stay allocated. backward: buckets during the backward pass. sent: contiguous copies to
    send. prefetch: weights that are gathered before they are needed.
    """

    always: float
    backward: float
    sent: float
    prefetch: float

    @classmethod
    def of(cls, size: ModelSize, stage: Stage, bf16: bool, cuda: bool) -> "_Buckets":
        most = min(BUCKET_ELEMENTS, size.parameters)
        low = min(most, size.low_precision) if bf16 else 0
        rest = min(most, size.parameters - (size.low_precision if bf16 else 0))
        if cuda:  # a bucket of full size for each precision
            low, rest = (most if low else 0), (most if rest else 0)
        sent_bytes = 2 if bf16 and size.low_precision else 4  # bytes per number, for most numbers
        if stage == 0:
            return cls(0.0, 0.0, 0.0, 0.0)
        if stage == 3:
            return cls(2.0 * low + 4.0 * rest, 0.0, float(sent_bytes * most), float(sent_bytes * most))
        copies = 2 if cuda else 1
        sent = 4.0 * most + (2.0 * most if sent_bytes == 2 else 0.0)
        return cls(0.0, copies * 4.0 * (low + rest), sent, 0.0)


def _phases(
    size: ModelSize, footprint: Footprint, parallelism: ParallelismConfig, ranks: Ranks, bucket: _Buckets
) -> list[Memory]:
    parameters, stage, alone = float(size.parameters), parallelism.zero_stage, ranks.num == 1
    whole, own = 4 * parameters, 4 * parameters / ranks.num
    casts = 2.0 * size.low_precision if parallelism.precision == "bf16" and stage < 3 else 0.0
    kept_casts = casts if parallelism.activations == "keep" else 0.0
    on_device = parallelism.offload == "none"
    # Gradients of earlier micro batches; at stage 3 the partition contains them.
    held = {0: whole, 1: whole, 2: own if on_device else 0.0, 3: 0.0}[stage] if ranks.accumulates else 0.0
    gathered = 4 * min(parameters, LIVE_ELEMENTS) if stage == 3 else 0.0
    eager = bucket.backward if ranks.cuda else 0.0  # on a CPU its pages are written while activations are freed
    backward = footprint.kept + footprint.working + kept_casts
    phases = [
        Memory("forward", gathered, held, activations=footprint.kept + casts, buffers=bucket.prefetch),
        Memory("backward", gathered, held, activations=backward, buffers=eager),
    ]
    match stage:
        case 0:
            copied = 0.0 if alone else 4 * min(parameters, _STAGE_0_ELEMENTS)
            phases += [
                Memory("backward", 0.0, whole, activations=footprint.working),
                Memory("reduction", 0.0, whole, buffers=copied),
                Memory("update", 0.0, whole),
            ]
        case 1 | 2:
            late = stage == 1 and (ranks.accumulates or not ranks.cuda)
            in_bucket = min(1.0, BUCKET_ELEMENTS / max(parameters, 1.0))
            mine = own if on_device else 0.0
            # Gradients in a bucket are not counted twice.
            gradients = whole * (1 - in_bucket) if late else mine * (1 - in_bucket) + held
            buffers = bucket.backward + bucket.sent
            phases += [
                Memory("reduction", 0.0, gradients, activations=footprint.working, buffers=buffers),
                Memory("update", 0.0, 2 * mine),
            ]
        case 3:
            phases += [
                Memory("reduction", activations=footprint.working, buffers=bucket.sent),
                Memory("update", 0.0, own if on_device else 0.0),
            ]
    return phases


def memory_per_rank(recipe: Recipe, event_shape: tuple[int, ...], size: ModelSize, ranks: int, cuda: bool) -> Memory:
    """Peak memory of a rank.

    Args:
        recipe: the sections that describe training.
        event_shape: shape of the model's input.
        size: number of parameters of the flow.
        ranks: number of ranks.
        cuda: whether the ranks are GPUs.
    """
    training, parallelism = recipe.training, recipe.parallelism
    assert not isinstance(recipe.model, TunedDecoderConfig), "only the registered version knows the size of its decoder"
    footprint = activation_footprint(
        recipe.model, event_shape, training.micro_batch_size, parallelism.activations, parallelism.precision == "bf16"
    )
    accumulates = training.global_batch_size > training.micro_batch_size * ranks
    averages = len(training.ema_half_life_images)
    return memory_of(size, footprint, parallelism, averages, Ranks(ranks, accumulates, cuda))
