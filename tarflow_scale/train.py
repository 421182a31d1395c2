"""Verb ``train``: shards to a registered model version.

Open the data, build the flow, put it under DeepSpeed, train from the latest checkpoint to the configured number of
images, export the averaged weights and register them. The same command again continues where the run stopped.
Start it on several ranks with torchrun; see ``launch/``.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from tarflow_scale import distributed, storage, telemetry
from tarflow_scale.config import Guidance, ModelConfig, SamplingConfig, Section, TrainConfig
from tarflow_scale.errors import DataError, NumericsError
from tarflow_scale.flows import Flow, build
from tarflow_scale.flows.memory import estimated_activation_bytes
from tarflow_scale.flows.weights import flow_files
from tarflow_scale.records import PixelFormat, canonical_json
from tarflow_scale.registry import Registry
from tarflow_scale.sampling import Sampler
from tarflow_scale.shards.images import contact_sheet
from tarflow_scale.shards.loader import Loader
from tarflow_scale.shards.manifest import Manifest
from tarflow_scale.shards.mix import Mix, MixPart, open_mix
from tarflow_scale.shards.order import steps_per_epoch
from tarflow_scale.training.ema import WeightAverage
from tarflow_scale.training.engine import Engine, deepspeed_config, start_process_group
from tarflow_scale.training.loop import Loop
from tarflow_scale.training.noise import noisy_images

__all__ = ["run"]

_PREVIEW_IMAGES = 40
_PREVIEW_ZOOM = 4
_GIB = 1024**3
_REMOTE_READ_BYTES = 1_000_000
"""Smaller reads from a store cost more processor time than decoding (evals/results/loader-cpu.json)."""


def run(config: TrainConfig, dry_run: bool) -> None:
    """Train, export, register.

    Raises:
        UserError: the data set, the counts or the run folder do not fit the configuration.
    """
    mix = open_mix(config.data, config.training.global_batch_size, config.training.seed)
    manifest = _seen_by_model(mix.manifest, config.data.augmentation.crop_pixels)
    with torch.device("meta"):
        num_parameters = sum(p.numel() for p in _build(config.model, manifest).parameters())
    ranks = distributed.world_size()
    deepspeed_config(config.optimizer, config.training, config.parallelism, num_parameters, ranks)
    if distributed.is_main():
        _print_plan(config, mix, manifest, num_parameters)
    if dry_run:
        return

    device = start_process_group(config.training.threads)
    torch.manual_seed(config.training.seed)
    flow = _build(config.model, manifest)
    flow.pixels = _pixel_format(config, manifest)
    flow.activations = config.parallelism.activations
    reader = Loader(
        mix=mix,
        slots=_own_slots(mix.num_slots),
        config=config.data,
        seed=config.training.seed,
        quarantine_path=f"{config.logging.path}/quarantine-{distributed.rank():05d}.jsonl",
        pin_memory=device.type == "cuda",
    )
    _initialize(flow.to(device), reader, config)
    engine = Engine(flow, device, config.optimizer, config.training, config.parallelism)
    loop = Loop(
        engine=engine,
        average=WeightAverage(engine, config.training.ema_half_life_images),
        reader=reader,
        pixels=flow.pixels,
        class_conditional=flow.num_classes is not None,
        run=_identity(config, mix),
        training=config.training,
        optimizer=config.optimizer,
        schedule=config.schedule,
        checkpoints=config.checkpoint,
        logging=config.logging,
        preview=_preview(config, manifest, flow.pixels),
    )
    progress = loop.resume()
    if distributed.is_main():
        _describe_run(config)
    loop.fit(progress)
    weights = loop.averaged_weights()
    if distributed.is_main():
        _publish(config, mix, flow, weights, progress.images_seen, num_parameters)
    distributed.barrier()
    distributed.shut_down()


def _build(model: ModelConfig, manifest: Manifest) -> Flow:
    return build(model, manifest.event_shape, manifest.num_classes or None)


def _initialize(flow: Flow, reader: Loader, config: TrainConfig) -> None:
    """Data-dependent initialisation on a micro batch of every rank, before DeepSpeed divides the weights.

    A resumed run repeats it; the checkpoint then overwrites what it set.
    """
    assert flow.pixels is not None
    batch = reader.first()[: config.training.micro_batch_size]
    device = next(flow.parameters()).device
    x = noisy_images(batch, flow.pixels, config.training.seed, device)
    y = torch.from_numpy(batch.labels).to(device) if flow.num_classes is not None else None
    flow.train().initialize(x, y)
    distributed.broadcast_module(flow)


def _pixel_format(config: TrainConfig, manifest: Manifest) -> PixelFormat:
    noise = config.training.noise
    return PixelFormat(bit_depth=manifest.bit_depth, noise=noise.kind, noise_std=noise.std)


def _own_slots(num_slots: int) -> range:
    """This rank's run of slots."""
    share = num_slots // distributed.world_size()
    return range(distributed.rank() * share, (distributed.rank() + 1) * share)


def _seen_by_model(manifest: Manifest, crop_pixels: int | None) -> Manifest:
    """The manifest with the size of the images that the model sees."""
    if crop_pixels is None:
        return manifest
    if crop_pixels > manifest.image_size_pixels:
        raise DataError(
            f"data.augmentation.crop_pixels must not exceed the images (got {crop_pixels} and "
            f"{manifest.image_size_pixels}); lower it or leave it out"
        )
    return manifest.model_copy(update={"image_size_pixels": crop_pixels})


def _identity(config: TrainConfig, mix: Mix) -> dict[str, Any]:
    """What must not change when a run continues; ranks, ZeRO stage, logging and length may."""
    training = config.training.model_dump(mode="json", include={"global_batch_size", "seed", "noise", "label_drop"})
    further = [[part.shards.manifest.digest, part.weight] for part in mix.parts[1:]]
    return {
        "data": mix.manifest.digest,
        **({"data.weight": config.data.weight, "data.mix": further} if further else {}),
        **_changed({"data.augmentation": config.data.augmentation}),
        "data.shuffle_block": config.data.shuffle_block,
        "model": config.model.model_dump(mode="json"),
        **{f"training.{key}": value for key, value in training.items()},
        "training.ema_half_life_images": config.training.ema_half_life_images,
    }


def _changed(sections: dict[str, Section]) -> dict[str, Any]:
    """Those that are not at their defaults, so that runs from before a section was there can go on."""
    return {name: section.model_dump(mode="json") for name, section in sections.items() if section != type(section)()}


def _config_digest(config: TrainConfig) -> str:
    return storage.digest(canonical_json(config.model_dump(mode="json")))


def _describe_run(config: TrainConfig) -> None:
    """Leave beside the results what made them: resolved configuration, its digest, commit and versions."""
    folder = Path(config.logging.path)
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    storage.write_bytes(str(folder / "config.yaml"), text.encode())
    facts = {
        "config_digest": _config_digest(config),
        "git_commit": telemetry.git_commit(),
        "packages": telemetry.package_versions(),
        "ranks": distributed.world_size(),
    }
    storage.write_bytes(str(folder / "environment.json"), canonical_json(facts))


def _preview(config: TrainConfig, manifest: Manifest, pixels: PixelFormat) -> Callable[[dict[str, Tensor], int], None]:
    """A function that draws a grid from an unwrapped copy of the averaged weights; column c holds class c."""

    def draw(weights: dict[str, Tensor], images_seen: int) -> None:
        with torch.device("meta"):
            flow = _build(config.model, manifest)
        flow.load_state_dict(weights, assign=True)
        flow.pixels = pixels
        guidance = Guidance(scale=config.logging.preview_guidance)
        sampler = Sampler(flow.eval(), 0, SamplingConfig(batch_size=_PREVIEW_IMAGES, guidance=guidance))
        columns = manifest.num_classes if 0 < manifest.num_classes <= _PREVIEW_IMAGES else 8
        try:
            images = sampler.images(range(_PREVIEW_IMAGES // columns * columns)).numpy()
        except NumericsError as error:  # no reason to stop a run whose loss is finite
            warnings.warn(f"no preview at {images_seen} images: {error}", stacklevel=2)
            return
        path = f"{config.logging.path}/previews/images-{images_seen:012d}.png"
        storage.write_bytes(path, contact_sheet(images, columns, _PREVIEW_ZOOM))

    return draw


def _publish(
    config: TrainConfig, mix: Mix, flow: Flow, weights: dict[str, Tensor], images_seen: int, parameters: int
) -> None:
    """Export the averaged weights to the run folder and register them."""
    facts = mix.manifest.facts().model_copy(update={"image_size_pixels": flow.event_shape[1]})
    files = flow_files(flow, weights)
    for name, content in files.items():
        storage.write_bytes(f"{config.logging.path}/model/{name}", content)
    assert flow.pixels is not None
    version = Registry(config.registry.path, config.registry.model).register(
        files,
        {
            "pixels": flow.pixels.model_dump(mode="json"),
            "data": facts.model_dump(mode="json"),
            "parameters": parameters,
            "images_seen": images_seen,
            "ema_half_life_images": config.training.ema_half_life_images,
            "config_digest": _config_digest(config),
            "git_commit": telemetry.git_commit(),
            "packages": telemetry.package_versions(),
        },
        reason=f"end of training {config.logging.path}",
    )
    memory = telemetry.peak_memory_bytes() / _GIB
    print(
        f"registered {config.registry.model}@{version.version} in {config.registry.path} (peak {memory:.2f} GiB a rank)"
    )


def _print_plan(config: TrainConfig, mix: Mix, manifest: Manifest, num_parameters: int) -> None:
    training, ranks = config.training, distributed.world_size()
    steps = -(-training.total_images // training.global_batch_size)
    state = num_parameters * _state_bytes_per_parameter(config.parallelism.zero_stage, ranks)
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
        ("state", f"{state / _GIB:.3f} GiB a rank (weights, gradients, moments, average)"),
        ("activations", f"about {activations / _GIB:.3f} GiB a rank ({config.parallelism.activations})"),
        ("loader", f"{loader / _GIB:.4f} GiB a rank at most (slots x 2 blocks x bytes per sample)"),
        ("reads", _read_size(config.data.shuffle_block, mix)),
        ("output", f"{config.logging.path}, registry {config.registry.path}"),
    ]
    print(telemetry.table(rows, ("train", "")))


def _data_row(part: MixPart, manifest: Manifest) -> str:
    own = part.shards.manifest
    share = f"{part.spec.num_slots} of every batch, {steps_per_epoch(part.spec):,} steps an epoch"
    return f"{own.name}/{own.split}: {own.num_images} images {manifest.event_shape}, {share}"


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


def _state_bytes_per_parameter(stage: int, ranks: int) -> float:
    """The arithmetic of `ParallelismConfig`."""
    replicated, divided = {0: (16, 4), 1: (8, 16), 2: (4, 20), 3: (0, 24)}[stage]
    return replicated + divided / ranks
