"""Peak memory of a rank, part by part, computed from a configuration.

Memory that stays allocated, in bytes per parameter on N ranks with E moving averages (Rajbhandari et al., "ZeRO",
arXiv 1910.02054, section 3, for fp32 weights, and the behaviour of DeepSpeed 0.19.8):

    stage 0     weights 4, moments 8, averages 4 E / N
    stage 1, 2  weights 4, masters 4 / N, moments 8 / N, averages 4 E / N
    stage 3     weights 4 / N, masters 4 / N, moments 8 / N, averages 4 E / N, gradients 4 / N, a bucket

The rest is temporary and never allocated all at once. The peak is the largest of four phases of a step:

    forward     activations saved for the backward pass, weights in bf16, and at stage 3 the gathered weights: up to a
                billion of them, which DeepSpeed keeps until the backward pass, and a prefetch in flight
    backward    the same without the prefetch, the first unit's gradients, and at stages 1 and 2 the reduction buckets
    reduction   gradients (stage 0: all; stage 1: all if they accumulate or nothing overlaps, else this rank's;
                stage 2: this rank's), the buckets, and the contiguous copy that is sent
    update      this rank's gradients, and a contiguous copy of them

Gradients are freed after a step, so unless they accumulate, gradients and activations are not allocated together. Muon
has one moment, and a second copy of it so that a step can be rejected. With bf16 autocast the gradients of linear
layers and convolutions are sent in bf16, in their own buckets. GPUs have two buckets, so that reductions overlap with
the backward pass; a CPU has one, whose pages take no memory until they are written. Measurements of processes are in
``evals/results/capacity-cpu.json``.
"""

from dataclasses import dataclass, fields
from typing import Literal

from tarflow_scale.capacity.activations import Footprint, activation_footprint
from tarflow_scale.config.train import ParallelismConfig, Recipe

__all__ = ["BUCKET_ELEMENTS", "LIVE_ELEMENTS", "Memory", "ModelSize", "Ranks", "memory_of", "memory_per_rank"]

BUCKET_ELEMENTS = 50_000_000
"""Size of a bucket: numbers that are reduced or gathered at once."""
LIVE_ELEMENTS = 1_000_000_000
"""Weights that stage 3 keeps gathered between two uses; DeepSpeed's default."""
_STAGE_0_ELEMENTS = 500_000_000
"""Numbers that DeepSpeed reduces at once at stage 0."""
_CUDA_CONTEXT_BYTES = 1.5e9
"""CUDA context, kernels, NCCL channels and cuBLAS workspace; an assumption, not measured."""

Stage = Literal[0, 1, 2, 3]


@dataclass(frozen=True)
class ModelSize:
    """Parameters of a flow.

    Args:
        parameters: all parameters.
        low_precision: parameters of plain linear layers and convolutions, which bf16 autocast casts and whose gradients
            DeepSpeed sends in bf16.
    """

    parameters: int
    low_precision: int = 0


@dataclass(frozen=True)
class Ranks:
    """How a run is divided.

    Args:
        num: number of ranks.
        accumulates: whether a rank takes several micro batches in a step.
        cuda: whether the ranks are GPUs.
    """

    num: int
    accumulates: bool
    cuda: bool


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank in the phase of its peak; ``in_main`` comes on top, in main memory."""

    moment: Literal["forward", "backward", "reduction", "update"]
    weights: float
    gradients: float
    optimizer: float
    averages: float
    activations: float
    buffers: float
    context: float
    in_main: float

    @property
    def total(self) -> float:
        """Bytes on the device."""
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, float]:
        """Bytes by name, in the order of the table."""
        return {part.name: getattr(self, part.name) for part in fields(self) if part.name not in ("moment", "in_main")}


@dataclass(frozen=True)
class _Moment:
    name: Literal["forward", "backward", "reduction", "update"]
    weights: float = 0.0
    gradients: float = 0.0
    activations: float = 0.0
    buffers: float = 0.0

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.activations + self.buffers


def memory_of(
    size: ModelSize, footprint: Footprint, parallelism: ParallelismConfig, num_averages: int, ranks: Ranks
) -> Memory:
    """Peak memory of a rank.

    Args:
        size: parameters of the flow.
        footprint: activations of one micro batch.
        parallelism: the section.
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
    if parallelism.offload != "none":  # including the gradients, because the CPU makes the update
        in_main = masters + moments + averages + 4 * parameters * share
        masters = moments = averages = partition = 0.0
    if parallelism.offload == "all":
        in_main, weights = in_main + weights, 0.0
    worst = max(_moments(size, footprint, parallelism, ranks, bucket), key=lambda moment: moment.total)
    return Memory(
        moment=worst.name,
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
    """Bytes of reduction buckets, always or in the backward pass; of the copy that is sent; of a prefetch."""

    always: float
    backward: float
    sent: float
    prefetch: float

    @classmethod
    def of(cls, size: ModelSize, stage: Stage, bf16: bool, cuda: bool) -> "_Buckets":
        most = min(BUCKET_ELEMENTS, size.parameters)
        low = min(most, size.low_precision) if bf16 else 0
        rest = min(most, size.parameters - (size.low_precision if bf16 else 0))
        if cuda:  # allocated whole, one for each precision
            low, rest = (most if low else 0), (most if rest else 0)
        travelling = 2 if bf16 and size.low_precision else 4  # bytes of most numbers
        if stage == 0:
            return cls(0.0, 0.0, 0.0, 0.0)
        if stage == 3:
            return cls(2.0 * low + 4.0 * rest, 0.0, float(travelling * most), float(travelling * most))
        copies = 2 if cuda else 1
        sent = 4.0 * most + (2.0 * most if travelling == 2 else 0.0)
        return cls(0.0, copies * 4.0 * (low + rest), sent, 0.0)


def _moments(
    size: ModelSize, footprint: Footprint, parallelism: ParallelismConfig, ranks: Ranks, bucket: _Buckets
) -> list[_Moment]:
    parameters, stage, alone = float(size.parameters), parallelism.zero_stage, ranks.num == 1
    whole, own = 4 * parameters, 4 * parameters / ranks.num
    casts = 2.0 * size.low_precision if parallelism.precision == "bf16" and stage < 3 else 0.0
    kept_casts = casts if parallelism.activations == "keep" else 0.0
    on_device = parallelism.offload == "none"
    # Gradients of earlier micro batches; at stage 3 they are part of the partition.
    held = {0: whole, 1: whole, 2: own if on_device else 0.0, 3: 0.0}[stage] if ranks.accumulates else 0.0
    gathered = 4 * min(parameters, LIVE_ELEMENTS) if stage == 3 else 0.0
    eager = bucket.backward if ranks.cuda else 0.0  # a CPU writes its pages while activations are freed
    moments = [
        _Moment("forward", gathered, held, footprint.kept + casts, bucket.prefetch),
        _Moment("backward", gathered, held, footprint.kept + footprint.working + kept_casts, eager),
    ]
    match stage:
        case 0:
            copied = 0.0 if alone else 4 * min(parameters, _STAGE_0_ELEMENTS)
            moments += [
                _Moment("backward", 0.0, whole, footprint.working),
                _Moment("reduction", 0.0, whole, 0.0, copied),
                _Moment("update", 0.0, whole),
            ]
        case 1 | 2:
            late = stage == 1 and (ranks.accumulates or not ranks.cuda)
            in_bucket = min(1.0, BUCKET_ELEMENTS / max(parameters, 1.0))
            mine = own if on_device else 0.0
            # Gradients in a bucket are not counted twice.
            gradients = whole * (1 - in_bucket) if late else mine * (1 - in_bucket) + held
            moments += [
                _Moment("reduction", 0.0, gradients, footprint.working, bucket.backward + bucket.sent),
                _Moment("update", 0.0, 2 * mine),
            ]
        case 3:
            moments += [
                _Moment("reduction", 0.0, 0.0, footprint.working, bucket.sent),
                _Moment("update", 0.0, own if on_device else 0.0),
            ]
    return moments


def memory_per_rank(recipe: Recipe, event_shape: tuple[int, ...], size: ModelSize, ranks: int, cuda: bool) -> Memory:
    """Peak memory of a rank.

    Args:
        recipe: the sections of the run.
        event_shape: shape of the model's input.
        size: parameters of the flow.
        ranks: world size.
        cuda: whether ranks are GPUs.
    """
    training, parallelism = recipe.training, recipe.parallelism
    footprint = activation_footprint(
        recipe.model, event_shape, training.micro_batch_size, parallelism.activations, parallelism.precision == "bf16"
    )
    accumulates = training.global_batch_size > training.micro_batch_size * ranks
    averages = len(training.ema_half_life_images)
    return memory_of(size, footprint, parallelism, averages, Ranks(ranks, accumulates, cuda))
