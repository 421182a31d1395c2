"""Print a plan: memory by stage, speed, traffic, data, scaling, and the assumptions."""

from dataclasses import dataclass

from tarflow_scale.capacity.advice import USABLE, Scenario, StagePlan, advice
from tarflow_scale.capacity.memory import ModelSize
from tarflow_scale.capacity.steps import LATENCY_SECONDS, LINK_EFFICIENCY, Point, default_mfu, efficiency, step_of
from tarflow_scale.runtime import console

__all__ = ["DECODED_BYTES_PER_SECOND", "Answer", "Sizes", "print_answer"]

_GB, _MB = 1e9, 1e6
DECODED_BYTES_PER_SECOND = {"png": 3454.0 * 3 * 64**2, "jpeg": 460.8 * 3 * 512**2}
"""Bytes of pixels that one core decodes and collates per second, measured with 64 px PNG and 512 px JPEG: see
``images_per_second_png64_ours_0`` and ``..._jpeg512_ours_0`` in ``evals/results/loader-cpu.json``."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of the data and of the model.

    Args:
        event_shape: shape of the model's input.
        model: number of parameters.
        decoded_bytes: size of a stored sample after decoding.
        packed_bytes: mean size of a sample on disk; None if there is no data set yet.
        codec: codec of stored samples; None if there is no data set yet.
        source: text that says where the sizes come from.
    """

    event_shape: tuple[int, ...]
    model: ModelSize
    decoded_bytes: int
    packed_bytes: float | None
    codec: str | None
    source: str


@dataclass(frozen=True)
class Answer:
    """The contents of a plan.

    Args:
        points: the scaling curve.
        price: price per GPU hour in $, or None.
        mfu_stated: whether the user gave the MFU.
    """

    scenario: Scenario
    sizes: Sizes
    stages: list[StagePlan]
    points: list[Point]
    price: float | None
    mfu_stated: bool


def print_answer(answer: Answer) -> None:
    """Print all sections of a plan."""
    sections = (_recipe, _memory, _speed, _traffic, _data, _scaling, _assumptions)
    print("\n\n".join(section(answer) for section in sections))


def _recipe(answer: Answer) -> str:
    scenario, training = answer.scenario, answer.scenario.recipe.training
    parallelism, card = scenario.recipe.parallelism, scenario.cluster.card
    each = training.micro_batch_size * scenario.gpus
    nodes = -(-scenario.gpus // scenario.cluster.gpus_per_node)
    steps = -(-training.total_images // training.global_batch_size)
    shape = "x".join(map(str, scenario.event_shape))
    flops = scenario.flops_per_image
    rows = [
        ("model", f"{scenario.recipe.model.kind}, {scenario.size.parameters:,} parameters, for {shape} "
         f"({answer.sizes.source})"),
        ("GPUs", f"{scenario.gpus} x {card.name}, {card.memory_bytes / _GB:.0f} GB, "
         f"on {nodes} machine{'s' * (nodes > 1)}"),
        ("as configured", f"ZeRO stage {parallelism.zero_stage}, {parallelism.precision}, activations "
         f"{parallelism.activations}, offload {parallelism.offload}"),
        ("batch", f"{training.global_batch_size:,} images = {training.micro_batch_size} x {scenario.gpus} GPUs x "
         f"{training.global_batch_size // each} (accumulation)"),
        ("length", f"{steps:,} steps, {steps * training.global_batch_size:,} images, "
         f"{flops / 1e12:.3g} TFLOP per image, {flops * steps * training.global_batch_size:.2g} FLOP in total"),
    ]  # fmt: skip
    return console.table(rows, ("plan", ""))


def _memory(answer: Answer) -> str:
    scenario = answer.scenario
    names = list(answer.stages[0].memory.parts)
    rows = [
        (
            _stage(plan, scenario),
            *(f"{size / _GB:.2f}" for size in plan.memory.parts.values()),
            f"{plan.memory.total / _GB:.1f}",
            f"{plan.memory.total / scenario.cluster.card.memory_bytes:.0%}",
            "yes" if plan.fits else "no",
            plan.memory.phase,
            f"{plan.memory.in_main * min(scenario.gpus, scenario.cluster.gpus_per_node) / _GB:.1f}",
            f"{plan.largest_micro_batch:,}" if plan.largest_micro_batch else "none",
        )
        for plan in answer.stages
    ]
    header = ("stage", *names, "GB per GPU", "used", "fits", "peak in", "host GB per machine", "largest micro batch")
    lines = (f"advice: {line}" for line in advice(scenario, answer.stages))
    return "\n".join([console.table(rows, header), "* as configured", *lines])


def _stage(plan: StagePlan, scenario: Scenario) -> str:
    return f"{plan.stage}{' *' if plan.stage == scenario.recipe.parallelism.zero_stage else ''}"


def _figure(value: float) -> str:
    """Format a number with four significant digits, or as an integer if it is 1,000 or more."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _short(value: float) -> str:
    """Format a number with three significant digits, or as an integer if it is 100 or more."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _time(hours: float) -> str:
    """Format a time in minutes, hours or days."""
    if hours < 1:
        return f"{60 * hours:.2g} minutes"
    return f"{hours:,.1f} hours" if hours < 48 else f"{hours:,.0f} hours = {hours / 24:,.1f} days"


def _speed(answer: Answer) -> str:
    scenario, training = answer.scenario, answer.scenario.recipe.training
    step = scenario.step(scenario.recipe)
    hours = training.total_images / step.images_per_second / 3600
    given = "stated" if answer.mfu_stated else "assumed, see below"
    alone = step_of(scenario.work(scenario.recipe), scenario.cluster, scenario.mfu, 1, training.micro_batch_size)
    rows = [
        ("GPU utilisation (MFU)", f"{scenario.mfu:.0%} ({given})"),
        ("step time", f"{step.seconds:.3g} s: computation {step.compute_seconds:.3g} s, waiting for traffic "
         f"{step.waiting_seconds:.2g} s"),
        ("images per second", f"{_figure(step.images_per_second)}, "
         f"{_figure(step.images_per_second / scenario.gpus)} per GPU"),
        ("scaling efficiency", f"the speed per GPU is {efficiency(step, scenario.gpus, alone):.1%} of the speed of a "
         f"single GPU"),
        ("time", f"{_time(hours)} for {training.total_images:,} images; GPU time {_time(hours * scenario.gpus)}"),
    ]  # fmt: skip
    if answer.price is not None:
        rows.append(("cost", f"${_short(hours * scenario.gpus * answer.price)} at ${answer.price:g} per GPU hour"))
    return console.table(rows, ("speed with the configured batch", ""))


def _traffic(answer: Answer) -> str:
    scenario = answer.scenario
    rows = [
        (
            _stage(plan, scenario),
            _short(plan.step.traffic.summed / _GB),
            _short(plan.step.traffic.gathered / _GB),
            _short(plan.step.traffic_seconds * 1e3),
            _short((plan.step.traffic_seconds - plan.step.waiting_seconds) * 1e3),
            _short(plan.step.waiting_seconds * 1e3),
            _short(plan.step.seconds * 1e3),
        )
        for plan in answer.stages
    ]
    header = ("stage", "GB summed", "GB gathered", "ms traffic", "ms hidden", "ms waiting", "ms per step")
    over = (
        f"GB: each GPU sends, and also receives, this much per step, over "
        f"{scenario.cluster.link(scenario.gpus) / _GB:.0f} GB/s; hidden: traffic that overlaps with computation"
    )
    return f"{console.table(rows, header)}\n{over}"


def _data(answer: Answer) -> str:
    scenario, sizes = answer.scenario, answer.sizes
    rate = scenario.step(scenario.recipe).images_per_second * min(1.0, scenario.cluster.gpus_per_node / scenario.gpus)
    packed = sizes.packed_bytes or float(sizes.decoded_bytes)
    bound = "" if sizes.packed_bytes else " at most (the size without compression)"
    codecs = [sizes.codec] if sizes.codec in DECODED_BYTES_PER_SECOND else list(DECODED_BYTES_PER_SECOND)
    cores = [f"{rate * sizes.decoded_bytes / DECODED_BYTES_PER_SECOND[codec]:.2g} ({codec})" for codec in codecs]
    rows = [
        ("images per second", f"{_figure(rate)} per machine"),
        ("from the store", f"{rate * packed / _MB:,.3g} MB/s per machine{bound}"),
        ("decoding cores", f"{' or '.join(cores)} per machine"),
    ]
    return console.table(rows, ("data", ""))


def _scaling(answer: Answer) -> str:
    training, alone = answer.scenario.recipe.training, answer.points[0].weak
    rows: list[tuple[str, ...]] = []
    for point in answer.points:
        strong = ("-", "-", "-")
        if point.strong is not None:
            hours = training.total_images / point.strong.images_per_second / 3600
            strong = (
                _figure(point.strong.images_per_second),
                f"{efficiency(point.strong, point.gpus, alone):.0%}",
                _figure(hours),
            )
        weak = (_figure(point.weak.images_per_second), f"{efficiency(point.weak, point.gpus, alone):.0%}")
        rows.append((str(point.gpus), f"{point.weak.images:,}", *weak, *strong))
    at_batch = f"strong: images/s at {training.global_batch_size:,}"
    header = ("GPUs", "weak: batch", "images/s", "efficiency", at_batch, "efficiency", "hours")
    return (
        f"{console.table(rows, header)}\n"
        f"weak: every GPU takes a micro batch of {training.micro_batch_size}, so the global batch grows; "
        f"strong: the GPUs share the recipe's global batch (-: not a multiple of the number of GPUs)"
    )


def _assumptions(answer: Answer) -> str:
    scenario, cluster = answer.scenario, answer.scenario.cluster
    parallelism = scenario.recipe.parallelism
    inside, between = cluster.card.link_bytes_per_second / _GB, cluster.network_bytes_per_second / _GB
    lines = [
        f"MFU: {scenario.mfu:.0%} of the {parallelism.precision} peak of {cluster.card.name}, for any micro batch; "
        f"published for bf16 transformers on H100: 35 to 46 % (the default is {default_mfu(parallelism):.0%})",
        f"links: {inside:g} GB/s inside a machine, {between:g} GB/s per GPU between machines (default: "
        f"{cluster.card.network}); traffic reaches {LINK_EFFICIENCY:.0%} of these speeds; latency "
        f"{LATENCY_SECONDS * 1e6:g} us per hop",
        "traffic overlaps with computation if DeepSpeed allows it, at stages 1 to 3; no time is counted for loading, "
        "checkpoints, validation, previews and the optimizer's update; the update matters if a GPU has few images",
        f"memory: {1 - USABLE:.0%} of a GPU's memory stays free, and CUDA and NCCL take 1.5 GB; compiled layers may "
        f"need less than predicted",
        "the predictions of memory and traffic were checked on CPU ranks (evals/results/capacity-cpu.json), not on a "
        "GPU",
    ]
    if scenario.recipe.model.kind != "tarflow":
        lines.append(
            "the MFU of this kind of model is not known; on a CPU, Glow reached 0.6 times the MFU of TarFlow (same "
            "file); pass --mfu with a measured value if you have one"
        )
    if parallelism.precision == "fp32":
        lines.append("the fp32 peak does not include tensor cores; by default, convolutions use TF32, which is faster")
    if parallelism.offload != "none":
        lines.append("the time that offloading takes is not counted")
    if parallelism.zero_plus_plus.enabled:
        lines.append("ZeRO++ is not counted: it reduces traffic, and hpZ takes more memory")
    if scenario.recipe.optimizer.kind == "muon":
        lines.append("Muon's own matrix products are not counted")
    return "assumptions:\n" + "\n".join(f"  {line}" for line in lines)
