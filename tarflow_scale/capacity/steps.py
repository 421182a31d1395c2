"""Estimate speed, traffic and scaling of a run on N GPUs from an assumed utilisation.

Compute. A rank takes ``n F / (u R)`` seconds for n images of a step. F is the number of operations of a training step
per image (`tarflow_scale.capacity.flops`), R the peak FLOP/s of the card, and u the model FLOPs utilisation (MFU) of
one card, without recomputation. Published values of u for bf16 transformers on H100s are 41.8 % at 1 B parameters on 8
GPUs and 40.9 % on 64 (llm-foundry, FSDP), and 44.3 % at 1.3 B on one machine (nanotron). So the default is 40 %. With
recomputed activations it is three quarters of that, because three of four passes count. We know no published values for
other cards or for convolutional flows, and assume the same value.

Traffic. In a ring of N ranks, each rank sends and receives ``2 (N-1)/N M`` bytes for an all-reduce of M bytes, and half
as many for an all-gather or reduce-scatter of M bytes (Patarasuk and Yuan, 2009). With P parameters and ``g`` bytes per
gradient (4, or 2 for weights that bf16 autocast casts), a step moves:

    stage 0     all-reduce of 4 P, once per step, after the backward pass
    stage 1     all-reduce of g P, once per step, during the last backward pass; then an all-gather of 4 P, the weights
    stage 2     all-reduce of g P, for every micro batch, during its backward pass; then an all-gather of 4 P
    stage 3     all-gather of g P and reduce-scatter of g P, for every micro batch, both during the passes; a second
                all-gather in the backward pass of models above a billion parameters

In the ZeRO paper (arXiv 1910.02054, section 7) stages 1 and 2 do a reduce-scatter and move 2 P numbers per step.
DeepSpeed 0.19.8 all-reduces whole buckets and moves 3 P, as measured with gloo (``evals/results/capacity-cpu.json``).

Time of traffic. This is the number of bytes, divided by `LINK_EFFICIENCY` times the speed of the slowest link of the
ring. Inside a machine the link is NVLink. Between machines it is all network cards of a machine together, because rings
run through all of them. Each collective on a bucket adds ``2 ceil(log2 N)`` latencies, as in a tree. Traffic overlaps
with the passes where DeepSpeed allows it.
"""

import math
from dataclasses import dataclass

from tarflow_scale.capacity.gpus import Card
from tarflow_scale.capacity.memory import BUCKET_ELEMENTS, LIVE_ELEMENTS, ModelSize
from tarflow_scale.config.parallelism import ParallelismConfig

__all__ = [
    "Cluster",
    "Point",
    "StepTime",
    "Traffic",
    "Work",
    "curve",
    "default_mfu",
    "efficiency",
    "step_of",
    "traffic_of",
]

DEFAULT_MFU = 0.4
RECOMPUTING = 3 / 4
"""If activations are recomputed, the utilisation is multiplied by this, because only 3 of 4 passes count."""
LINK_EFFICIENCY = 0.8
"""Fraction of a link's nominal speed that traffic reaches; an assumption."""
LATENCY_SECONDS = 10e-6
"""Latency from one rank to the next; an assumption."""
MOST_GPUS = 1024


@dataclass(frozen=True)
class Cluster:
    """A cluster of machines with GPUs.

    Args:
        card: the GPU.
        gpus_per_node: number of GPUs per machine.
        network_bytes_per_second: network speed between machines, per GPU, in one direction.
    """

    card: Card
    gpus_per_node: int
    network_bytes_per_second: float

    def link(self, gpus: int) -> float:
        """Speed in bytes per second of a ring of ``gpus`` GPUs, in one direction."""
        slowest = self.card.link_bytes_per_second
        if gpus > self.gpus_per_node:
            slowest = min(slowest, self.gpus_per_node * self.network_bytes_per_second)
        return LINK_EFFICIENCY * slowest


@dataclass(frozen=True)
class Work:
    """The work of a training step.

    Args:
        flops_per_image: operations of a training step per image.
        size: number of parameters of the flow.
        parallelism: the section ``parallelism``.
        micro_batch_size: maximum number of images per forward pass and rank.
    """

    flops_per_image: float
    size: ModelSize
    parallelism: ParallelismConfig
    micro_batch_size: int


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends in a step; it receives the same number.

    Args:
        summed: bytes of gradients.
        gathered: bytes of weights.
        hideable: bytes that can be sent while the forward and backward passes run.
        num_collectives: number of all-reduces, reduce-scatters and all-gathers.
    """

    summed: float
    gathered: float
    hideable: float
    num_collectives: int

    @property
    def total(self) -> float:
        """Bytes of gradients and weights."""
        return self.summed + self.gathered


def default_mfu(parallelism: ParallelismConfig) -> float:
    """The MFU that a plan assumes if the user gives none; for its sources see the module."""
    return DEFAULT_MFU * (1.0 if parallelism.activations == "keep" else RECOMPUTING)


def traffic_of(
    size: ModelSize, parallelism: ParallelismConfig, ranks: int, micro_batches: int, cuda: bool = True
) -> Traffic:
    """Bytes that a rank sends in a step.

    Args:
        size: number of parameters of the flow.
        parallelism: the section ``parallelism``.
        ranks: number of ranks.
        micro_batches: number of micro batches of a rank in a step.
        cuda: whether the ranks are GPUs. Then traffic overlaps with the passes, and NCCL does a reduce-scatter where
            gloo does an all-reduce.
    """
    parameters, passed_on = float(size.parameters), (ranks - 1) / ranks
    low = size.low_precision if parallelism.precision == "bf16" else 0
    gradients = 4 * parameters - 2 * low
    buckets = -(-size.parameters // BUCKET_ELEMENTS)
    if ranks == 1:
        return Traffic(0.0, 0.0, 0.0, 0)
    match parallelism.zero_stage:
        case 0:
            return Traffic(passed_on * 2 * 4 * parameters, 0.0, 0.0, buckets)
        case 1 | 2:
            times = micro_batches if parallelism.zero_stage == 2 else 1
            summed = passed_on * 2 * gradients * times
            return Traffic(summed, passed_on * 4 * parameters, summed if cuda else 0.0, buckets * times + buckets)
        case 3:
            gatherings = 1 if size.parameters <= LIVE_ELEMENTS else 2
            gathered = passed_on * gradients * micro_batches * gatherings
            summed = passed_on * gradients * micro_batches * (1 if cuda else 2)
            hideable = gathered + summed if cuda else 0.0
            return Traffic(summed, gathered, hideable, buckets * micro_batches * (gatherings + 1))


@dataclass(frozen=True)
class StepTime:
    """Time of an optimizer step on N GPUs.

    Args:
        images: number of images that all ranks process together.
        compute_seconds: time of the forward and backward passes.
        traffic: bytes that a rank sends.
        traffic_seconds: time of the traffic.
        waiting_seconds: time of the traffic that does not overlap with the passes.
    """

    images: int
    compute_seconds: float
    traffic: Traffic
    traffic_seconds: float
    waiting_seconds: float

    @property
    def seconds(self) -> float:
        """Time of the step."""
        return self.compute_seconds + self.waiting_seconds

    @property
    def images_per_second(self) -> float:
        """Throughput of all ranks together."""
        return self.images / self.seconds


def step_of(work: Work, cluster: Cluster, mfu: float, gpus: int, images: int) -> StepTime:
    """Time of a step of ``images`` images on ``gpus`` GPUs; ``images`` must be a multiple of ``gpus``."""
    each = images // gpus
    micro = -(-each // work.micro_batch_size)
    peak = cluster.card.bf16_flops if work.parallelism.precision == "bf16" else cluster.card.fp32_flops
    compute = each * work.flops_per_image / (peak * mfu)
    traffic = traffic_of(work.size, work.parallelism, gpus, micro)
    if gpus == 1:
        return StepTime(images, compute, traffic, 0.0, 0.0)
    latency = traffic.num_collectives * 2 * math.ceil(math.log2(gpus)) * LATENCY_SECONDS
    moving = traffic.total / cluster.link(gpus) + latency
    hideable = moving * traffic.hideable / traffic.total
    # The backward pass takes two thirds of the time. Stage 1 overlaps with the backward pass of the last micro batch,
    # stage 2 with the backward passes of all micro batches, stage 3 with all forward and backward passes.
    behind = {0: 0.0, 1: 2 / 3 / micro, 2: 2 / 3, 3: 1.0}[work.parallelism.zero_stage] * compute
    return StepTime(images, compute, traffic, moving, moving - min(hideable, behind))


@dataclass(frozen=True)
class Point:
    """A point of the scaling curve.

    Args:
        gpus: number of GPUs.
        weak: a step in which every GPU takes one micro batch, so the global batch grows with the number of GPUs.
        strong: a step with the recipe's global batch; None if it is not a multiple of the number of GPUs.
    """

    gpus: int
    weak: StepTime
    strong: StepTime | None


def curve(work: Work, cluster: Cluster, mfu: float, global_batch_size: int) -> list[Point]:
    """The scaling curve: steps on 1, 2, 4, ..., 1,024 GPUs."""
    points: list[Point] = []
    for gpus in (2**power for power in range(round(math.log2(MOST_GPUS)) + 1)):
        weak = step_of(work, cluster, mfu, gpus, work.micro_batch_size * gpus)
        strong = step_of(work, cluster, mfu, gpus, global_batch_size) if global_batch_size % gpus == 0 else None
        points.append(Point(gpus, weak, strong))
    return points


def efficiency(step: StepTime, gpus: int, alone: StepTime) -> float:
    """Throughput per GPU of ``step`` on ``gpus`` GPUs, divided by the throughput of ``alone``, a step on one GPU."""
    return step.images_per_second / gpus / alone.images_per_second
