"""Speed, traffic and scaling of a run on N GPUs, from a stated utilisation: arithmetic alone, no device.

Compute. A rank's step of n images takes ``n F / (u R)`` seconds: F operations of a training step for an image
(`tarflow_scale.capacity.flops`), R the peak of the card, u the model FLOPs utilisation (MFU) of one card, which counts
no recomputation. Published for transformers in bf16 on H100s: 41.8 % at 1 B parameters on 8 GPUs and 40.9 % on 64
(llm-foundry, FSDP); 44.3 % at 1.3 B on a node (nanotron); hence 40 % unless told, and three quarters of it where
activations are computed again, since that is one more forward pass for three. For other cards and for convolutional
flows we know no such figure, and take the same.

Traffic. In a ring, each of N ranks sends and receives ``2 (N-1)/N M`` bytes to sum M bytes on all ranks, and half of
that to gather M bytes or to leave each rank its part of a sum (Patarasuk and Yuan, 2009). A step moves, for P
parameters (``g`` bytes a gradient: 4, or 2 for weights that bf16 autocast casts):

    stage 0     sum of 4 P, once a step, after the backward pass
    stage 1     sum of g P, once a step, during the last backward pass; then a gathering of 4 P, the new weights
    stage 2     sum of g P, for every micro batch, during its backward pass; then a gathering of 4 P
    stage 3     gathering of g P and partial sum of g P, for every micro batch, both during the passes; one gathering
                more in the backward pass of models above a billion parameters

ZeRO's paper (arXiv 1910.02054, section 7) has partial sums at stages 1 and 2, hence 2 P numbers a step. DeepSpeed
0.19.8 sums whole buckets on all ranks there, which makes it 3 P; gloo counts so (``evals/results/capacity-cpu.json``).

Time of traffic. Bytes over the slowest link of the ring: NVLink inside a machine; between machines what their network
cards give together, since rings run through all of them; each times `LINK_EFFICIENCY`. And for each bucket
``2 ceil(log2 N)`` latencies, as in a tree. What a pass can hide, it hides.
"""

import math
from dataclasses import dataclass

from tarflow_scale.capacity.gpus import Card
from tarflow_scale.capacity.memory import BUCKET_ELEMENTS, LIVE_ELEMENTS, ModelSize
from tarflow_scale.config.train import ParallelismConfig

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
"""Of the utilisation is left where activations are computed again: 3 passes of use in 4."""
LINK_EFFICIENCY = 0.8
"""Of a link's nominal speed; an assumption."""
LATENCY_SECONDS = 10e-6
"""From one rank to the next; an assumption."""
MOST_GPUS = 1024


@dataclass(frozen=True)
class Cluster:
    """Machines of GPUs.

    Args:
        card: the GPU.
        gpus_per_node: of a machine.
        network_bytes_per_second: between machines, for each GPU, one direction.
    """

    card: Card
    gpus_per_node: int
    network_bytes_per_second: float

    def link(self, gpus: int) -> float:
        """Bytes a second that a ring of so many GPUs passes on in one direction."""
        inside = self.card.link_bytes_per_second
        if gpus > self.gpus_per_node:
            inside = min(inside, self.gpus_per_node * self.network_bytes_per_second)
        return LINK_EFFICIENCY * inside


@dataclass(frozen=True)
class Work:
    """What is trained, and how.

    Args:
        flops_per_image: of a training step.
        size: parameters.
        parallelism: the section.
        micro_batch_size: images of a forward pass, at most.
    """

    flops_per_image: float
    size: ModelSize
    parallelism: ParallelismConfig
    micro_batch_size: int


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends, and as many that it receives, in a step.

    Args:
        summed: of gradients. gathered: of weights.
        hideable: of both, that travel while the passes compute.
        num_collectives: sums and gatherings.
    """

    summed: float
    gathered: float
    hideable: float
    num_collectives: int

    @property
    def total(self) -> float:
        """All of it."""
        return self.summed + self.gathered


def default_mfu(parallelism: ParallelismConfig) -> float:
    """Utilisation to plan with where none is stated; see the module."""
    return DEFAULT_MFU * (1.0 if parallelism.activations == "keep" else RECOMPUTING)


def traffic_of(
    size: ModelSize, parallelism: ParallelismConfig, ranks: int, micro_batches: int, cuda: bool = True
) -> Traffic:
    """What a rank sends in a step.

    Args:
        size: parameters.
        parallelism: the section.
        ranks: N.
        micro_batches: that a rank takes in a step.
        cuda: GPUs overlap traffic and passes, and NCCL has partial sums; gloo sums on all ranks instead.
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
    """An optimizer step on N GPUs.

    Args:
        images: of all ranks.
        compute_seconds: of the passes.
        traffic: of a rank.
        traffic_seconds: if nothing hid it.
        waiting_seconds: of that, what the passes do not hide.
    """

    images: int
    compute_seconds: float
    traffic: Traffic
    traffic_seconds: float
    waiting_seconds: float

    @property
    def seconds(self) -> float:
        """All."""
        return self.compute_seconds + self.waiting_seconds

    @property
    def images_per_second(self) -> float:
        """Of all ranks."""
        return self.images / self.seconds


def step_of(work: Work, cluster: Cluster, mfu: float, gpus: int, images: int) -> StepTime:
    """A step of ``images`` on ``gpus``, which must divide them."""
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
    # Two thirds of the passes go backward; at stage 1 only the last micro batch's, at stage 3 both directions count.
    behind = {0: 0.0, 1: 2 / 3 / micro, 2: 2 / 3, 3: 1.0}[work.parallelism.zero_stage] * compute
    return StepTime(images, compute, traffic, moving, moving - min(hideable, behind))


@dataclass(frozen=True)
class Point:
    """A number of GPUs on the curve; None where the batch cannot be divided among them.

    Args:
        gpus: N.
        weak: every GPU takes a micro batch, so the global batch grows with N.
        strong: the global batch is what it is.
    """

    gpus: int
    weak: StepTime
    strong: StepTime | None


def curve(work: Work, cluster: Cluster, mfu: float, global_batch_size: int) -> list[Point]:
    """Steps on 1 to 1,024 GPUs, doubling."""
    points: list[Point] = []
    for power in range(round(math.log2(MOST_GPUS)) + 1):
        gpus = 2**power
        divides = global_batch_size % gpus == 0
        points.append(
            Point(
                gpus,
                step_of(work, cluster, mfu, gpus, work.micro_batch_size * gpus),
                step_of(work, cluster, mfu, gpus, global_batch_size) if divides else None,
            )
        )
    return points


def efficiency(step: StepTime, gpus: int, alone: StepTime) -> float:
    """Images a second of one of ``gpus``, as a fraction of those of ``alone``, a step on one GPU."""
    return step.images_per_second / gpus / alone.images_per_second
