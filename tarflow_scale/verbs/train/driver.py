"""Verb ``train``: shards to a registered model version.

Open the data, build the flow, put it under DeepSpeed, train from the latest checkpoint to the configured number of
images, export the averaged weights and register them. The same command again continues where the run stopped.
Start it on several ranks with torchrun; see ``launch/``.

Reads ``<data.path>`` (and ``data.mix``). Writes the run folder ``logging.path``: ``config.yaml`` (where a run goes on
with other settings, the earlier ones are ``config-until-IMAGES.yaml``), ``environment.json``, ``status.json``,
``log.jsonl``, ``curve.png`` (the loss), ``checkpoints/``, ``previews/``, ``quarantine-*.jsonl`` of corrupt samples, and
at the end ``model/``, which is also registered as ``registry.model``. A folder of another run, or of one that is still
running, and counts that do not divide are errors. A run that is told to stop saves a checkpoint and ends with exit code
75; one that was killed loses what came after its latest whole checkpoint, and trains it again, on as many ranks to the
same weights.
"""

import warnings
from collections.abc import Callable, Container, Generator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor

from tarflow_scale import storage
from tarflow_scale.capacity.flops import tokens_per_image, training_flops
from tarflow_scale.config.base import Section
from tarflow_scale.config.data import AugmentationConfig
from tarflow_scale.config.model import RealNVPConfig
from tarflow_scale.config.sampling import Guidance, SamplingConfig
from tarflow_scale.config.train import TrainConfig
from tarflow_scale.density.picture import density_picture
from tarflow_scale.errors import ConfigError, Interrupted, NumericsError, RegistryError, UserError
from tarflow_scale.flows import Flow
from tarflow_scale.flows.weights import flow_files
from tarflow_scale.pages.runs import CURVE_NAME, CurveFile
from tarflow_scale.records import PixelFormat, canonical_json
from tarflow_scale.registry import Registry
from tarflow_scale.runtime import distributed, provenance
from tarflow_scale.runtime.processes import exclusive
from tarflow_scale.sampling import Sampler
from tarflow_scale.shards.images import contact_sheet
from tarflow_scale.shards.loader import Loader
from tarflow_scale.shards.manifest import Manifest
from tarflow_scale.shards.mix import Mix, open_mix
from tarflow_scale.training import run_log
from tarflow_scale.training.checkpoint import newest as newest_checkpoint
from tarflow_scale.training.construction import flow_of, seen_by_model
from tarflow_scale.training.course import Course
from tarflow_scale.training.ema import WeightAverages
from tarflow_scale.training.engine import Engine, start_process_group
from tarflow_scale.training.folder import STOP_SECONDS, check_shared, configuration_of, describe_run, follow_launcher
from tarflow_scale.training.loop import Loop
from tarflow_scale.training.meter import Meter, peak_flops_of
from tarflow_scale.training.noise import conditions, model_input
from tarflow_scale.training.progress import Progress
from tarflow_scale.training.validation import Validation
from tarflow_scale.training.zero import deepspeed_config, model_size
from tarflow_scale.verbs.train.overview import print_plan

__all__ = ["run"]

_PREVIEW_IMAGES = 40
_PREVIEW_ZOOM = 4
_GIB = 1024**3


def run(config: TrainConfig, dry_run: bool) -> None:
    """Train, export, register.

    Raises:
        UserError: the data set, the counts or the run folder do not fit the configuration.
        Interrupted: the run was asked to stop and can go on.
    """
    mix = open_mix(config.data, config.training.global_batch_size, config.training.seed)
    manifest = seen_by_model(mix.manifest, config.data.augmentation.crop_pixels)
    _check_vectors(config, manifest)
    with torch.device("meta"):
        size = model_size(flow_of(config.model, manifest))
    num_parameters = size.parameters
    ranks = distributed.world_size()
    deepspeed_config(config.optimizer, config.training, config.parallelism, num_parameters, ranks)
    run_log.check_log_packages(config.logging.tensorboard, config.logging.wandb_project)
    validation = config.validation and Validation.open(
        config.validation,
        like=manifest,
        data_path=config.data.path,
        batch_size=config.training.micro_batch_size,
        pixels=_pixel_format(config, manifest),
        conditional=config.model.class_conditional,
    )
    course = Course(config, _identity(config, mix))
    found = course.latest(reads_files=False)
    if distributed.is_main():
        print_plan(config, mix, manifest, size, course.begins(found))
    if dry_run:
        if found is not None and (line := course.rate_change(found[1])):
            _say(line)
        return

    follow_launcher()
    if ranks > 1:
        _say(f"waiting for all {ranks} ranks")
    device = start_process_group(config.training.threads)
    check_shared(config.logging.path, device)
    with ExitStack() as held:
        distributed.from_main(lambda: held.enter_context(exclusive(storage.local(config.logging.path), STOP_SECONDS)))
        _train(config, mix, manifest, validation, device, course, num_parameters)
    distributed.barrier()
    distributed.shut_down()


def _train(
    config: TrainConfig,
    mix: Mix,
    manifest: Manifest,
    validation: Validation | None,
    device: torch.device,
    course: Course,
    num_parameters: int,
) -> None:
    torch.manual_seed(config.training.seed)
    flow = flow_of(config.model, manifest)
    flow.pixels = _pixel_format(config, manifest)
    flow.activations = config.parallelism.activations
    reader = Loader(
        mix=mix,
        slots=_own_slots(mix.num_slots),
        config=config.data,
        seed=config.training.seed,
        quarantine_path=str(storage.local(config.logging.path) / f"quarantine-{distributed.rank():05d}.jsonl"),
        pin_memory=device.type == "cuda",
    )
    _say("initialising the flow on the first images")
    _initialize(flow.to(device), reader, config)
    _say("starting DeepSpeed")
    engine = Engine(flow, device, config.optimizer, config.training, config.parallelism)
    loop = Loop(
        engine=engine,
        averages=WeightAverages(engine, config.training.ema_half_life_images),
        reader=reader,
        pixels=flow.pixels,
        vectors=manifest.vectors,
        conditional=config.model.class_conditional,
        course=course,
        training=config.training,
        checkpoints=config.checkpoint,
        logging=config.logging,
        validation=(validation, config.validation.every_images) if validation and config.validation else None,
        meter=Meter(
            flops_per_image=training_flops(config.model, manifest.event_shape),
            tokens_per_image=tokens_per_image(config.model, manifest.event_shape),
            peak_flops=config.logging.peak_flops or peak_flops_of(device),
            ranks=distributed.world_size(),
        ),
        preview=_preview(config, manifest, flow.pixels, device),
    )
    progress = loop.resume()
    _say(_what_follows(config, progress.images_seen, course.total_images))
    with _recorded(config, progress, course.total_images) as log:
        loop.fit(progress, log)
    for half_life in reversed(config.training.ema_half_life_images):
        weights = loop.averaged_weights(half_life)
        if distributed.is_main():
            _publish(config, mix, flow, weights, half_life, progress.images_seen, num_parameters)


def _say(text: str) -> None:
    """A line about the run, once."""
    if distributed.is_main():
        print(text)


def _what_follows(config: TrainConfig, images_seen: int, total_images: int) -> str:
    path, seen = config.logging.path, f"{images_seen:,} images"
    if images_seen >= total_images:
        return f"nothing to train, {path} has seen all {seen}"
    begins = f"going on after {seen}" if images_seen else "training begins"
    return (
        f"{begins}: up to {total_images:,}; figures every {config.logging.every_images:,} images in {path}/log.jsonl, "
        f"{path}/{CURVE_NAME} shows the loss; Ctrl-C saves and stops"
    )


@contextmanager
def _recorded(config: TrainConfig, progress: Progress, total_images: int) -> Generator[run_log.Log]:
    """The run folder's account of itself, on rank 0: what made it, its log, and how it stands."""
    if not distributed.is_main():
        yield run_log.Log()
        return
    describe_run(config, progress.images_seen)
    logging = config.logging
    resolved = config.model_dump(mode="json")

    def status(state: str, reason: str = "") -> None:
        record = {"state": state, "images_seen": progress.images_seen, "total_images": total_images, "reason": reason}
        record["time"] = datetime.now(UTC).isoformat(timespec="seconds")
        storage.write_bytes(f"{logging.path}/status.json", canonical_json(record))

    status("running")
    try:
        with (
            run_log.open_log(
                storage.local(logging.path), progress.images_seen, logging.tensorboard, logging.wandb_project, resolved
            ) as log,
            CurveFile(logging.path) as curve,
        ):
            yield run_log.Log([log.write, curve.take])
    except Interrupted as error:
        status("stopped", str(error))
        raise
    except Exception as error:
        status("failed", str(error) if isinstance(error, UserError) else repr(error))
        raise
    status("finished")


def _initialize(flow: Flow, reader: Loader, config: TrainConfig) -> None:
    """Data-dependent initialisation on a micro batch of every rank, before DeepSpeed divides the weights.

    A resumed run repeats it; the checkpoint then overwrites what it set.
    """
    assert flow.pixels is not None
    batch = reader.first()[: config.training.micro_batch_size]
    device = next(flow.parameters()).device
    vectors = reader.mix.manifest.vectors
    x = model_input(batch, flow.pixels, vectors, config.training.seed, device)
    y = conditions(batch, vectors, 0.0, config.training.seed, device) if config.model.class_conditional else None
    flow.train().initialize(x, y)
    distributed.broadcast_module(flow)


def _pixel_format(config: TrainConfig, manifest: Manifest) -> PixelFormat:
    noise = config.training.noise
    return PixelFormat(bit_depth=manifest.bit_depth, noise=noise.kind, noise_std=noise.std)


def _own_slots(num_slots: int) -> range:
    """This rank's run of slots."""
    share = num_slots // distributed.world_size()
    return range(distributed.rank() * share, (distributed.rank() + 1) * share)


def _check_vectors(config: TrainConfig, manifest: Manifest) -> None:
    """Vectors have no pixels, and what they are given with cannot be dropped.

    Raises:
        ConfigError: settings that are for the other kind of data.
    """
    noise, vectors = config.training.noise.kind, manifest.vectors
    if (noise == "none") != (vectors is not None):
        right = "uniform or gaussian" if vectors is None else "none"
        raise ConfigError(f"training.noise.kind must be {right} for {manifest.samples_in_words} (got {noise}); set it")
    if vectors is None:
        return
    if config.data.augmentation != AugmentationConfig():
        raise ConfigError("data.augmentation is for images (got vectors); leave it out")
    if vectors.num_conditions and manifest.num_classes and config.model.class_conditional:
        raise ConfigError(
            f"a flow is conditioned on labels or on numbers (got {manifest.num_classes} classes and "
            f"{vectors.num_conditions} numbers in {manifest.name}); pack without either"
        )
    if vectors.num_conditions and config.model.class_conditional and config.training.label_drop > 0:
        raise ConfigError(
            f"training.label_drop must be 0 where vectors are given with numbers, which cannot be dropped (got "
            f"{config.training.label_drop:g}); set it to 0"
        )


def _identity(config: TrainConfig, mix: Mix) -> dict[str, Any]:
    """What must not change when a run continues; ranks, ZeRO stage, logging and length may, see `_batch_statistics`."""
    training = config.training.model_dump(mode="json", include={"global_batch_size", "seed", "noise", "label_drop"})
    half_lives = config.training.ema_half_life_images
    further = [[part.shards.manifest.digest, part.weight] for part in mix.parts[1:]]
    return {
        "data": mix.manifest.digest,
        **({"data.weight": config.data.weight, "data.mix": further} if further else {}),
        **_changed({"data.augmentation": config.data.augmentation}),
        "data.shuffle_block": config.data.shuffle_block,
        "model": config.model.model_dump(mode="json"),
        **_batch_statistics(config),
        **{f"training.{key}": value for key, value in training.items()},
        "training.ema_half_life_images": half_lives[0] if len(half_lives) == 1 else list(half_lives),
        **({"optimizer.kind": config.optimizer.kind} if config.optimizer.kind != "adamw" else {}),
    }


def _batch_statistics(config: TrainConfig) -> dict[str, Any]:
    """Images that batch normalisation takes statistics of together; no other model sees how a batch is divided.

    One pass takes a micro batch of every rank. Where that is the whole batch, its division among ranks has no effect;
    else it says which images go together.
    """
    if not (isinstance(config.model, RealNVPConfig) and config.model.normalization == "batch"):
        return {}
    division = [config.training.micro_batch_size, distributed.world_size()]
    whole = config.training.global_batch_size
    return {"training.micro_batch_size x ranks": whole if division[0] * division[1] == whole else division}


def _changed(sections: dict[str, Section]) -> dict[str, Any]:
    """Those that are not at their defaults, so that runs from before a section was there can go on."""
    return {name: section.model_dump(mode="json") for name, section in sections.items() if section != type(section)()}


def _preview(
    config: TrainConfig, manifest: Manifest, pixels: PixelFormat, device: torch.device
) -> Callable[[dict[str, Tensor], int], None]:
    """A function that draws samples of an unwrapped copy of the averaged weights; a column shows one class."""

    def draw(weights: dict[str, Tensor], images_seen: int) -> None:
        with torch.device("meta"):
            flow = flow_of(config.model, manifest)
        flow.load_state_dict({name: weight.to(device) for name, weight in weights.items()}, assign=True)
        flow.pixels = pixels
        path = f"{config.logging.path}/previews/images-{images_seen:012d}.png"
        if manifest.vectors is not None:
            _picture_of_density(flow.eval(), path)
            return
        guidance = Guidance(scale=config.logging.preview_guidance)
        columns = manifest.num_classes if 0 < manifest.num_classes <= _PREVIEW_IMAGES else 8
        try:
            sampler = Sampler(flow.eval(), 0, SamplingConfig(batch_size=None, guidance=guidance))
            images = sampler.images(range(_PREVIEW_IMAGES // columns * columns)).numpy()
            names = [manifest.class_names[i % columns] for i in range(len(images))] if flow.num_classes else None
        except (NumericsError, ConfigError) as error:  # no reason to stop a run whose loss is finite
            warnings.warn(f"no preview at {images_seen} images: {error}", stacklevel=2)
            return
        storage.write_bytes(path, contact_sheet(images, columns, _PREVIEW_ZOOM, names))

    return draw


def _picture_of_density(flow: Flow, path: str) -> None:
    """The preview of a flow of two numbers; there is none of more."""
    if flow.event_shape != (2,) or flow.num_conditions is not None:
        return
    try:
        storage.write_bytes(path, density_picture(flow))
    except (NumericsError, ValueError) as error:  # no reason to stop a run whose loss is finite
        warnings.warn(f"no picture of the density: {error}", stacklevel=2)


def _publish(
    config: TrainConfig,
    mix: Mix,
    flow: Flow,
    weights: dict[str, Tensor],
    half_life: int,
    images_seen: int,
    parameters: int,
) -> None:
    """Export an average of the weights to the run folder and register it."""
    facts = mix.manifest.facts()
    if facts.vectors is None:
        facts = facts.model_copy(update={"image_size_pixels": flow.event_shape[1]})
    files = flow_files(flow, weights)
    folder = "model" if half_life == config.training.ema_half_life_images[0] else f"model-ema-{half_life}"
    for name, content in files.items():
        storage.write_bytes(f"{config.logging.path}/{folder}/{name}", content)
    assert flow.pixels is not None
    registry = Registry(config.registry.path, config.registry.model)
    known: Container[int] = ()
    with suppress(RegistryError):  # there is no such model yet
        known = registry.state().versions
    version = registry.register(
        files,
        {
            "pixels": flow.pixels.model_dump(mode="json"),
            "data": facts.model_dump(mode="json"),
            "parameters": parameters,
            "images_seen": images_seen,
            "ema_half_life_images": half_life,
            "config_digest": storage.digest(configuration_of(config)),
            "git_commit": provenance.git_commit(),
            "packages": provenance.package_versions(),
            "checkpoint": newest_checkpoint(f"{config.logging.path}/checkpoints"),
        },
        f"end of training {config.logging.path}",
        configuration_of(config),
    )
    memory = provenance.peak_memory_bytes(next(flow.parameters()).device.type) / _GIB
    name = f"{config.registry.model}@{version.version}"
    if version.version in known:
        print(f"the model is registered as {name} in {config.registry.path} already")
        return
    print(
        f"registered {name} in {config.registry.path} (peak {memory:.2f} GiB a rank); samples are in "
        f"{config.logging.path}/previews, and 'tarflow-scale evaluate' comes next"
    )
