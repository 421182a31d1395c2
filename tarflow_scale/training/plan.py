"""What a run will be, in a table: data, sizes, batch arithmetic, memory. Printed before anything starts."""

from tarflow_scale import distributed, storage, telemetry
from tarflow_scale.config import TrainConfig
from tarflow_scale.flows.cost import estimated_activation_bytes, training_flops
from tarflow_scale.shards.manifest import Manifest
from tarflow_scale.shards.mix import Mix, MixPart
from tarflow_scale.shards.order import steps_per_epoch
from tarflow_scale.training.zero import state_bytes_per_parameter

__all__ = ["print_plan"]

_GIB = 1024**3
_REMOTE_READ_BYTES = 1_000_000
"""Smaller reads from a store cost more processor time than decoding (evals/results/loader-cpu.json)."""


def print_plan(config: TrainConfig, mix: Mix, manifest: Manifest, num_parameters: int) -> None:
    """Print the table; ``manifest`` is of the images that the model sees."""
    training, ranks = config.training, distributed.world_size()
    steps = -(-training.total_images // training.global_batch_size)
    on_device, in_main = state_bytes_per_parameter(config.parallelism, len(training.ema_half_life_images), ranks)
    aside = f", {num_parameters * in_main / _GIB:.3f} GiB in main memory" if in_main else ""
    loader = mix.num_slots // ranks * 2 * config.data.shuffle_block * mix.bytes_per_sample
    activations = estimated_activation_bytes(
        config.model,
        manifest.event_shape,
        training.micro_batch_size,
        config.parallelism.activations,
        config.parallelism.precision == "bf16",
    )
    rows = [
        *(("data", _data_row(part, manifest)) for part in mix.parts),
        ("model", f"{config.model.kind}, {num_parameters:,} parameters"),
        ("ranks", f"{ranks}, ZeRO stage {config.parallelism.zero_stage}, {config.parallelism.precision}"),
        ("batch", _batch_arithmetic(config, ranks)),
        ("length", f"{steps:,} steps = {steps * training.global_batch_size:,} images"),
        ("operations", _operations(config, manifest, steps * training.global_batch_size)),
        ("state", f"{num_parameters * on_device / _GIB:.3f} GiB a rank (weights, gradients, moments, averages){aside}"),
        ("activations", f"about {activations / _GIB:.3f} GiB a rank ({config.parallelism.activations})"),
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
