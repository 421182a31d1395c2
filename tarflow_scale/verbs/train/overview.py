"""What a run will be, in a table: data, sizes, batch arithmetic, memory. Printed before anything starts."""

import torch

from tarflow_scale import storage
from tarflow_scale.capacity.flops import training_flops
from tarflow_scale.capacity.memory import ModelSize, memory_per_rank
from tarflow_scale.config.train import TrainConfig
from tarflow_scale.runtime import console, distributed
from tarflow_scale.shards.manifest import Manifest
from tarflow_scale.shards.mix import Mix, MixPart
from tarflow_scale.shards.order import steps_per_epoch

__all__ = ["print_plan"]

_GIB = 1024**3


_REMOTE_READ_BYTES = 1_000_000
"""Smaller reads from a store cost more processor time than decoding (evals/results/loader-cpu.json)."""


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
            f"PyTorch (1 GiB on a CPU); the verb plan says more",
        ),
        ("loader", f"{loader / _GIB:.4f} GiB a rank at most (slots x 2 blocks x bytes per sample)"),
        ("reads", _read_size(config.data.shuffle_block, mix)),
        ("output", f"{config.logging.path}, registry {config.registry.path}"),
    ]
    print(console.table(rows, ("train", "")))


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
