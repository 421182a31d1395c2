"""The overview of a run, printed before anything starts: data, sizes, batch arithmetic, memory."""

import torch

from tarflow_scale import storage
from tarflow_scale.capacity.flops import training_flops
from tarflow_scale.capacity.memory import memory_per_rank
from tarflow_scale.config.train import Recipe, TrainingConfig
from tarflow_scale.runtime import console, distributed
from tarflow_scale.shards.manifest import Manifest
from tarflow_scale.shards.mix import Mix, MixPart
from tarflow_scale.shards.order import steps_per_epoch
from tarflow_scale.verbs.train.inputs import Inputs

__all__ = ["print_overview"]

_GIB = 1024**3
_REMOTE_READ_BYTES = 1_000_000
"""Reading fewer bytes at once from a store costs more CPU time than decoding (evals/results/loader-cpu.json)."""


def print_overview(recipe: Recipe, inputs: Inputs, shuffle_block: int, begins: str, output: str) -> None:
    """Print the overview as a table.

    Args:
        recipe: model, optimizer, training and parallelism.
        inputs: the data sets, and what the run trains.
        shuffle_block: number of samples per block, ``data.shuffle_block``.
        begins: text that says where training begins.
        output: text that says where results go.
    """
    training, parallelism, ranks = recipe.training, recipe.parallelism, distributed.world_size()
    mix, manifest = inputs.mix, inputs.manifest
    steps = -(-training.total_images // training.global_batch_size)
    loader = mix.num_slots // ranks * 2 * shuffle_block * mix.bytes_per_sample
    rows = [
        *(("data", _data_row(part, manifest)) for part in mix.parts),
        ("model", f"{recipe.model.kind}, {inputs.subject.size.parameters:,} parameters"),
        ("ranks", f"{ranks}, ZeRO stage {parallelism.zero_stage}, {parallelism.precision}"),
        ("batch", _batch_arithmetic(training, ranks)),
        ("length", f"{steps:,} steps = {steps * training.global_batch_size:,} images"),
        ("begins", begins),
        *_costs(recipe, inputs, steps * training.global_batch_size),
        ("loader", f"at most {loader / _GIB:.4f} GiB per rank (slots x 2 blocks x bytes per sample)"),
        ("reads", _read_size(shuffle_block, mix)),
        ("output", output),
    ]
    print(console.table(rows, ("train", "")))


def _costs(recipe: Recipe, inputs: Inputs, images: int) -> list[tuple[str, str]]:
    """Operations and memory; the decoder of a registered autoencoder is not described by a section."""
    subject, shape, parallelism = inputs.subject, inputs.manifest.event.shape, recipe.parallelism
    if subject.counted is None:
        return [("memory", f"not known before the first step for model.kind={recipe.model.kind}")]
    flops = training_flops(subject.counted, shape)
    memory = memory_per_rank(recipe, shape, subject.size, distributed.world_size(), torch.cuda.is_available())
    state = memory.total - memory.activations - memory.context
    host = f", {memory.in_main / _GIB:.3f} GiB in main memory" if memory.in_main else ""
    return [
        ("operations", f"{flops / 1e12:.3g} TFLOP per image, {flops * images:.2g} FLOP for the run"),
        ("state", f"{state / _GIB:.3f} GiB per rank (weights, gradients, moments, averages, buckets){host}"),
        ("activations", f"about {memory.activations / _GIB:.3f} GiB per rank ({parallelism.activations})"),
        (
            "memory",
            f"about {memory.total / _GIB:.3f} GiB per rank at its peak ({memory.phase}), besides Python and "
            f"PyTorch (1 GiB on a CPU); the verb plan shows details",
        ),
    ]


def _data_row(part: MixPart, manifest: Manifest) -> str:
    own = part.shards.manifest
    share = f"{part.spec.num_slots} samples of every batch, {steps_per_epoch(part.spec):,} steps per epoch"
    return f"{own.name}/{own.split}: {own.num_images} {manifest.event}, {share}"


def _read_size(shuffle_block: int, mix: Mix) -> str:
    """Text that states the size of each read, with advice if it is too small for a store with high latency."""
    block = shuffle_block * mix.bytes_per_sample
    text = f"{block / 1e6:.3g} MB, a block of {shuffle_block} samples"
    if block >= _REMOTE_READ_BYTES or not any(storage.is_remote(part.shards.path) for part in mix.parts):
        return text
    enough = -(-2 * _REMOTE_READ_BYTES // mix.bytes_per_sample)
    return f"{text}; too small for fast reads from a store: raise data.shuffle_block to {enough}"


def _batch_arithmetic(training: TrainingConfig, ranks: int) -> str:
    accumulation = training.global_batch_size // (training.micro_batch_size * ranks)
    return f"{training.global_batch_size} = {training.micro_batch_size} x {ranks} ranks x {accumulation} accumulated"
