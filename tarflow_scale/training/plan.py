"""What a run will be, in a table: data, sizes, batch arithmetic, memory. Printed before anything starts."""

import torch

from tarflow_scale import distributed, storage, telemetry
from tarflow_scale.config import ModelConfig, TrainConfig
from tarflow_scale.errors import DataError
from tarflow_scale.flows import Flow, build
from tarflow_scale.flows.cost import training_flops
from tarflow_scale.flows.footprint import activation_footprint
from tarflow_scale.shards.manifest import Manifest
from tarflow_scale.shards.mix import Mix, MixPart
from tarflow_scale.shards.order import steps_per_epoch
from tarflow_scale.training.memory import Memory, ModelSize, Ranks, memory_of

__all__ = ["flow_of", "memory_per_rank", "print_plan", "seen_by_model"]

_GIB = 1024**3
_REMOTE_READ_BYTES = 1_000_000
"""Smaller reads from a store cost more processor time than decoding (evals/results/loader-cpu.json)."""


def flow_of(model: ModelConfig, manifest: Manifest) -> Flow:
    """The flow for a data set."""
    if manifest.num_conditions is not None:
        return build(model, manifest.event_shape, None, manifest.num_conditions)
    flow = build(model, manifest.event_shape, manifest.num_classes or None)
    flow.class_names = manifest.class_names if flow.num_classes else ()
    return flow


def seen_by_model(manifest: Manifest, crop_pixels: int | None) -> Manifest:
    """The manifest with the size of the images that the model sees.

    Raises:
        DataError: the crop is larger than the images.
    """
    if crop_pixels is None:
        return manifest
    if crop_pixels > manifest.image_size_pixels:
        raise DataError(
            f"data.augmentation.crop_pixels must not exceed the images (got {crop_pixels} and "
            f"{manifest.image_size_pixels}); lower it or leave it out"
        )
    return manifest.model_copy(update={"image_size_pixels": crop_pixels})


def memory_per_rank(
    config: TrainConfig, event_shape: tuple[int, ...], size: ModelSize, ranks: int, cuda: bool
) -> Memory:
    """What a rank needs at its worst moment.

    Args:
        config: of the run.
        event_shape: of the images that the model sees.
        size: of the flow.
        ranks: world size.
        cuda: whether ranks are GPUs.
    """
    training, parallelism = config.training, config.parallelism
    footprint = activation_footprint(
        config.model, event_shape, training.micro_batch_size, parallelism.activations, parallelism.precision == "bf16"
    )
    accumulates = training.global_batch_size > training.micro_batch_size * ranks
    averages = len(training.ema_half_life_images)
    return memory_of(size, footprint, parallelism, averages, Ranks(ranks, accumulates, cuda))


def print_plan(config: TrainConfig, mix: Mix, manifest: Manifest, size: ModelSize, begins: str) -> None:
    """Print the table; ``manifest`` is of the images that the model sees, ``begins`` says in words where."""
    training, ranks = config.training, distributed.world_size()
    steps = -(-training.total_images // training.global_batch_size)
    memory = memory_per_rank(config, manifest.event_shape, size, ranks, torch.cuda.is_available())
    state = memory.total - memory.activations - memory.context
    aside = f", {memory.in_main / _GIB:.3f} GiB in main memory" if memory.in_main else ""
    loader = mix.num_slots // ranks * 2 * config.data.shuffle_block * mix.bytes_per_sample
    rows = [
        *(("data", _data_row(part, manifest)) for part in mix.parts),
        ("model", f"{config.model.kind}, {size.parameters:,} parameters"),
        ("ranks", f"{ranks}, ZeRO stage {config.parallelism.zero_stage}, {config.parallelism.precision}"),
        ("batch", _batch_arithmetic(config, ranks)),
        ("length", f"{steps:,} steps = {steps * training.global_batch_size:,} images"),
        ("begins", begins),
        ("operations", _operations(config, manifest, steps * training.global_batch_size)),
        ("state", f"{state / _GIB:.3f} GiB a rank (weights, gradients, moments, averages, buckets){aside}"),
        ("activations", f"about {memory.activations / _GIB:.3f} GiB a rank ({config.parallelism.activations})"),
        (
            "memory",
            f"about {memory.total / _GIB:.3f} GiB a rank, at most in the {memory.moment}, beside Python and "
            f"PyTorch (1 GiB on a CPU); --plan says more",
        ),
        ("loader", f"{loader / _GIB:.4f} GiB a rank at most (slots x 2 blocks x bytes per sample)"),
        ("reads", _read_size(config.data.shuffle_block, mix)),
        ("output", f"{config.logging.path}, registry {config.registry.path}"),
    ]
    print(telemetry.table(rows, ("train", "")))


def _operations(config: TrainConfig, manifest: Manifest, images: int) -> str:
    flops = training_flops(config.model, manifest.event_shape)
    return f"{flops / 1e12:.3g} TFLOP an image, {flops * images:.2g} FLOP the run"


def _data_row(part: MixPart, manifest: Manifest) -> str:
    own = part.shards.manifest
    share = f"{part.spec.num_slots} of every batch, {steps_per_epoch(part.spec):,} steps an epoch"
    return f"{own.name}/{own.split}: {own.num_images} {manifest.samples_in_words}, {share}"


def _read_size(shuffle_block: int, mix: Mix) -> str:
    """How large a range read is, and what to do where it is too small for a store that answers late."""
    block = shuffle_block * mix.bytes_per_sample
    text = f"{block / 1e6:.3g} MB, a block of {shuffle_block} samples"
    if block >= _REMOTE_READ_BYTES or not any(storage.is_remote(part.shards.path) for part in mix.parts):
        return text
    enough = -(-2 * _REMOTE_READ_BYTES // mix.bytes_per_sample)
    return f"{text}; small for a store, raise data.shuffle_block to {enough}"


def _batch_arithmetic(config: TrainConfig, ranks: int) -> str:
    training = config.training
    accumulation = training.global_batch_size // (training.micro_batch_size * ranks)
    return f"{training.global_batch_size} = {training.micro_batch_size} x {ranks} ranks x {accumulation} accumulated"
