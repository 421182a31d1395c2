"""Verb ``generate``: write shards of new images from a registered version, in the format that ``prepare`` writes.

The driver resolves all settings that affect the bytes into a plan, and stores the plan in the output folder. Each shard
is one idempotent unit of work: a worker decodes a range of images, stores the digests of the shard, writes the shard
and reads it back. The manifest is written last. The same command, run again, makes the missing shards with the same
bytes. Several drivers may work on one folder: each starts at a random shard and skips shards that exist.

Writes into ``shards.path``: ``plan.json`` first, then the tars with their indexes, ``quality.json``, ``manifest.json``,
and ``grid.png`` for images and two-dimensional vectors. It is an error if the folder holds another plan, if a shard
that is made again has other bytes, or if more samples are bad than ``sampling.guard`` allows. ``--calibrate`` instead
measures which decoding settings are fastest, and attaches them to the version.
"""

import functools
import random
from contextlib import closing

import torch

from tarflow_scale import storage
from tarflow_scale.config.cluster import ClusterConfig
from tarflow_scale.config.data import size_of
from tarflow_scale.config.generate import GenerateConfig, GeneratedShardsConfig, SeededSamplingConfig
from tarflow_scale.config.sampling import DecoderConfig, SamplingConfig
from tarflow_scale.config.versions import VersionConfig
from tarflow_scale.density.picture import density_picture
from tarflow_scale.errors import ConfigError, NumericsError, PlanError
from tarflow_scale.loading import calibration_for, load_version, worker_device
from tarflow_scale.pool import Pool
from tarflow_scale.records import GenerationPlan, canonical_json, changes
from tarflow_scale.registry import Registry
from tarflow_scale.runtime import console
from tarflow_scale.sampling import Quality, Sampler
from tarflow_scale.sampling import calibrate as measure_decoding
from tarflow_scale.sampling.labels import numbered
from tarflow_scale.shards.events import ImageEvent, event_of
from tarflow_scale.shards.export import check_folder, write_folder
from tarflow_scale.shards.images import contact_sheet
from tarflow_scale.shards.manifest import MANIFEST_NAME, Manifest, ShardRecord, read_manifest
from tarflow_scale.shards.npz import check_npz, write_npz
from tarflow_scale.shards.reader import ShardSet
from tarflow_scale.shards.writer import publish_manifest
from tarflow_scale.verbs.generate.worker import ShardMaker, ShardUnit, read_quality, recorded

__all__ = ["calibrate", "resolved_plan", "run"]

_PLAN = "plan.json"
_QUALITY = "quality.json"
_GRID = "grid.png"
_GRID_IMAGES = 100
_GRID_COLUMNS = 10
_GRID_ZOOM = 6
_GRID_PIXELS = 1000
"""Maximum width in pixels to which the grid is enlarged; a wider grid is not shrunk."""
_EXACT = 1e-3
"""Bound on `Sampler.round_trip_error`. If the error is larger, the model amplifies rounding errors."""
_MUCH_CLIPPED = 0.05
_FEW = 3
"""Number of images that may always be drawn again, unless ``guard.most_redrawn_share`` is 0."""


def run(config: GenerateConfig, dry_run: bool) -> None:
    """Make the shards that are missing, then the manifest.

    Raises:
        RegistryError: the version does not exist.
        PlanError: the folder holds another plan, or a shard that was made again has other bytes.
        DataError: ``shards.folder`` or ``shards.npz`` holds another data set.
    """
    shards, path = config.shards, config.shards.path
    plan = resolved_plan(config.registry, config.sampling, shards, config.cluster)
    units = _units(plan)
    _check_plan(shards, plan)
    _check_copies(shards)
    missing = [unit for unit in units if not recorded(path).is_done(unit.tar_name)]
    _print_plan(plan, len(units), len(missing), shards)
    if dry_run:
        return
    storage.create(storage.join(path, _PLAN), plan.to_json())
    _check_plan(shards, plan)  # another driver may have created its plan first
    last = (MANIFEST_NAME, _GRID) if _has_grid(plan) else (MANIFEST_NAME,)
    if not missing and all(storage.exists(storage.join(path, name)) for name in last):
        print(f"{path}: nothing to do, all {plan.num_images} images exist")
        _write_copies(shards)
        return
    quality, errors = _make(config.registry.path, plan, path, units, missing, config.cluster)
    storage.write_bytes(storage.join(path, _QUALITY), quality.to_json())
    finished = recorded(path)
    finished.remove_abandoned()
    publish_manifest(path, _manifest(plan, tuple(finished.record(unit.tar_name) for unit in units)))
    _write_grid(config.registry.path, path, plan)
    _print_result(plan, path, len(units), quality, errors)
    _write_copies(shards)


def _make(
    registry: str,
    plan: GenerationPlan,
    path: str,
    units: list[ShardUnit],
    missing: list[ShardUnit],
    cluster: ClusterConfig,
) -> tuple[Quality, list[float]]:
    """Make the missing shards; return the quality of all shards and `Sampler.round_trip_error` of new shards."""
    finished = [read_quality(recorded(path), unit) for unit in set(units) - set(missing)]
    quality = functools.reduce(Quality.plus, finished, Quality())
    _check_redrawn(quality, plan)
    errors: list[float] = []
    first = random.randrange(len(missing)) if missing else 0  # noqa: S311 - so that two drivers make different shards
    with Pool(**cluster.model_dump()) as pool:
        results = pool.run_missing(
            ShardMaker,
            {"registry": registry, "plan": plan, "path": path},
            units,
            missing[first:] + missing[:first],
            "generate",
            lambda: f"{quality.redrawn:,} drawn again" if quality.redrawn else "",
        )
        with closing(results):  # so that an error ends the progress bar before it is printed
            for _, (shard_quality, error) in results:
                errors += [] if error is None else [error]
                quality = quality.plus(shard_quality)
                _check_redrawn(quality, plan)
    return quality, errors


def _check_redrawn(quality: Quality, plan: GenerationPlan) -> None:
    guard, total = plan.guard, plan.num_images
    allowed = max(guard.most_redrawn_share * total, _FEW if guard.most_redrawn_share else 0)
    if quality.redrawn > allowed:
        lower = "sampling.temperature" + (" or sampling.guidance.scale" if plan.sampling.guidance.scale else "")
        raise NumericsError(
            f"{quality.redrawn} of {quality.images} images were drawn again ({quality.not_finite} not finite, "
            f"{quality.saturated} saturated; sampling.guard.most_redrawn_share={guard.most_redrawn_share:g} allows "
            f"{allowed:.0f} of {total}); lower {lower} (with a new shards.path), train longer, set "
            f"model.log_scale_bound, or raise sampling.guard.most_redrawn_share"
        )


def _check_copies(shards: GeneratedShardsConfig) -> None:
    """Raise an error before any work if `_write_copies` would fail or would overwrite files."""
    is_made = storage.exists(storage.join(shards.path, MANIFEST_NAME))
    digest = read_manifest(shards.path).digest if is_made else None
    if shards.folder is not None:
        if shards.folder.rstrip("/") == shards.path.rstrip("/"):
            raise ConfigError(f"shards.folder must not be shards.path (got {shards.folder}); choose another folder")
        check_folder(shards.folder, digest)
    if shards.npz is not None:
        check_npz(shards.npz, digest)


def _write_copies(shards: GeneratedShardsConfig) -> None:
    """Write the images of the finished shards as single files and as an npz file, if configured."""
    if shards.folder is not None:
        print(f"{shards.folder}: {write_folder(shards.path, shards.folder)} images as files")
    if shards.npz is not None:
        print(f"{shards.npz}: {write_npz(shards.path, shards.npz)} images")


def calibrate(config: GenerateConfig, dry_run: bool) -> None:
    """Measure which decoding settings are fastest on this machine, and attach them to the version.

    Raises:
        RegistryError: the version does not exist.
        ConfigError: the settings do not fit the model, or the model is not a TarFlow.
    """
    registry = Registry(config.registry.path, config.registry.model)
    version = registry.resolve(config.registry.version)
    torch.set_num_threads(config.cluster.cpus_per_worker)
    flow = load_version(config.registry.path, config.registry.model, version.version)
    flow = flow.to(worker_device(config.cluster.gpus_per_worker > 0))
    settings = _settings(config.sampling)
    if dry_run:
        Sampler(flow, config.sampling.seed, settings.model_copy(update={"decoder": DecoderConfig()}))
        print(f"dry run: would measure decoding of {config.registry.model}@{version.version}")
        return
    plan = measure_decoding(flow, config.sampling.seed, settings)
    registry.attach_calibration(version.version, plan, reason=f"decoding on {plan.device}")
    rows = [
        (str(number), "token by token" if block.chunk == 1 else f"{block.chunk} tokens at once", f"{mean:.1f}")
        for number, (block, mean) in enumerate(zip(plan.blocks, plan.iterations, strict=True), start=1)
    ]
    print(console.table(rows, ("block, in decoding order", "decoding", "iterations")))
    where = f"{config.registry.model}@{version.version} on {plan.device}, batch {plan.batch_size}"
    exact = f"{plan.batch_size / plan.exact_seconds:.3g} images/s"
    if all(block.chunk == 1 for block in plan.blocks):
        print(f"{where}: exact decoding is the fastest, {exact}")
        return
    print(
        f"{where}: {plan.batch_size / plan.adaptive_seconds:.3g} images/s, exact decoding {exact}; "
        f"largest error {plan.max_error:.2g}, {plan.pixels_within_one_level:.4%} of pixels within one level"
    )


def resolved_plan(
    registry: VersionConfig, sampling: SeededSamplingConfig, shards: GeneratedShardsConfig, cluster: ClusterConfig
) -> GenerationPlan:
    """Resolve all settings that affect the bytes of the shards into a plan.

    Raises:
        UserError: the version does not exist, or the settings do not fit the model.
    """
    versions = Registry(registry.path, registry.model)
    version = versions.resolve(registry.version)
    flow = load_version(registry.path, registry.model, version.version)
    settings = _settings(sampling)
    if flow.num_conditions is not None:
        raise ConfigError(
            f"generate needs a flow that is not conditioned on numbers (got a flow that takes {flow.num_conditions}); "
            f"in Python, call flow.sample(n, y) with the numbers"
        )
    of_images = (shards.folder, shards.npz, sampling.guard.saturated_share)
    event = event_of(version.trained_on, version.pixels.bit_depth).shown
    if not isinstance(event, ImageEvent) and any(setting is not None for setting in of_images):
        raise ConfigError(
            f"shards.folder, shards.npz and sampling.guard.saturated_share need a model of images (got a model of "
            f"{event.noun}); remove these keys"
        )
    decoding = calibration_for(versions, version.version, settings, cluster.gpus_per_worker > 0)
    rule = numbered(sampling.labels, version.trained_on.class_names)
    sampler = Sampler(flow, sampling.seed, settings, decoding, rule)  # refuses settings that do not fit the model
    if settings.batch_size is None:
        if cluster.gpus_per_worker:
            raise ConfigError(
                "sampling.batch_size must be a number on GPUs, because it changes the last bits of images (got none); "
                "set sampling.batch_size"
            )
        frozen = storage.read_if_there(storage.join(shards.path, _PLAN))  # its batch size fitted when it was made
        earlier = None if frozen is None else GenerationPlan.from_json(frozen, _PLAN).sampling.batch_size
        fitting = earlier or max(1, sampler.batch_size // cluster.num_workers)
        settings = settings.model_copy(update={"batch_size": fitting})
    return GenerationPlan(
        model=registry.model,
        version=version.version,
        weights_digest=version.weights_digest,
        seed=sampling.seed,
        num_images=sampling.num_images,
        samples_per_shard=shards.samples_per_shard,
        sampling=settings,
        labels=rule if flow.num_classes else "none",
        class_names=version.trained_on.class_names,
        image_size_pixels=1 if len(event.shape) == 1 else size_of(*event.shape[1:]),
        num_channels=event.shape[0],
        pixels=version.pixels,
        device="cuda" if cluster.gpus_per_worker else "cpu",
        threads=cluster.cpus_per_worker,
        decoding=decoding,
        codec=shards.codec,
        jpeg_quality=shards.jpeg_quality,
        guard=sampling.guard,
    )


def _settings(sampling: SeededSamplingConfig) -> SamplingConfig:
    """The settings that ``generate`` shares with ``evaluate``."""
    return SamplingConfig.model_validate(sampling.model_dump(include=set(SamplingConfig.model_fields)))


def _units(plan: GenerationPlan) -> list[ShardUnit]:
    size = plan.samples_per_shard
    starts = range(0, plan.num_images, size)
    return [ShardUnit(number, start, min(start + size, plan.num_images)) for number, start in enumerate(starts)]


def _check_plan(shards: GeneratedShardsConfig, plan: GenerationPlan) -> None:
    """Raise an error if the folder holds another plan, or files but no plan."""
    path, location = shards.path, storage.join(shards.path, _PLAN)
    content = storage.read_if_there(location)
    if content is None and any(not name.endswith(storage.PARTIAL) for name in storage.list_names(path)):
        content = storage.read_if_there(location)  # another driver may have created it meanwhile
        if content is None:
            raise PlanError(f"{path} holds other files (no {_PLAN}); choose another shards.path")
    if content is None:
        return
    if changed := changes(GenerationPlan.from_json(content, location).model_dump(), plan.model_dump()):
        outputs = ["path", *(name for name in ("folder", "npz") if getattr(shards, name) is not None)]
        replaced = " and ".join(f"shards.{name}" for name in outputs)
        raise PlanError(f"{path} holds another plan ({changed}); choose another {replaced}")


def _manifest(plan: GenerationPlan, shards: tuple[ShardRecord, ...]) -> Manifest:
    event = event_of(plan, plan.pixels.bit_depth)
    return Manifest(
        name=plan.model,
        split="generated",
        class_names=() if plan.labels == "none" else plan.class_names,
        codec=event.codec(plan.codec),
        **event.fields(),
        source=f"{plan.model}@{plan.version} {plan.weights_digest}",
        recipe=storage.digest(canonical_json(plan.model_dump(mode="json"))),
        shards=shards,
    )


def _has_grid(plan: GenerationPlan) -> bool:
    """Whether ``grid.png`` is written: a picture of images, or of the density of two-dimensional vectors."""
    event = event_of(plan, plan.pixels.bit_depth)
    return isinstance(event, ImageEvent) or event.shape == (2,)


def _write_grid(registry: str, path: str, plan: GenerationPlan) -> None:
    """Write a picture of the first images (with up to 20 classes, one class per column), or of a 2-d density."""
    if not _has_grid(plan):
        return
    if plan.vectors is not None:
        flow = load_version(registry, plan.model, plan.version)
        storage.write_bytes(storage.join(path, _GRID), density_picture(flow, plan.seed))
        return
    classes = len(plan.class_names)
    columns = classes * max(1, _GRID_COLUMNS // classes) if 0 < classes <= 2 * _GRID_COLUMNS else _GRID_COLUMNS
    batch = next(ShardSet(path).batches(0, min(_GRID_IMAGES, plan.num_images), _GRID_IMAGES))
    zoom = max(1, min(_GRID_ZOOM, _GRID_PIXELS // (columns * (batch.events.shape[-1] + 1))))
    labelled = plan.labels != "none" and plan.class_names
    names = [plan.class_names[label] for label in batch.labels] if labelled else None
    storage.write_bytes(storage.join(path, _GRID), contact_sheet(batch.events, columns, zoom, names))


def _print_plan(plan: GenerationPlan, num_units: int, num_missing: int, shards: GeneratedShardsConfig) -> None:
    size = event_of(plan, plan.pixels.bit_depth).size
    rows = [
        ("model", f"{plan.model}@{plan.version}, weights {plan.weights_digest[:12]}"),
        ("samples", f"{plan.num_images:,} of {size}, {_labels_in_words(plan)}, seed {plan.seed}"),
        ("sampling", _settings_line(plan.sampling)),
        ("shards", f"{num_units} of up to {plan.samples_per_shard} images, {num_missing} to make"),
        ("output", shards.path),
    ]
    copies = {"files": shards.folder, "npz": shards.npz}
    rows += [(name, place) for name, place in copies.items() if place is not None]
    print(console.table(rows, ("generate", "")))


def _labels_in_words(plan: GenerationPlan) -> str:
    match plan.labels:
        case "balanced" | "none":
            return f"{'no' if plan.labels == 'none' else plan.labels} labels"
        case dict():
            return "labels drawn by weight, " + ", ".join(f"{label}: {w:g}" for label, w in plan.labels.items())
        case _:
            return f"{len(plan.labels)} listed labels in turn"


def _settings_line(settings: SamplingConfig) -> str:
    guidance = settings.guidance
    how = f"{guidance.scale:g}{' annealed' if guidance.annealed else ''}"
    decoder = f"{settings.decoder.kind} in {settings.decoder.precision}"
    line = f"{decoder}, batch {settings.batch_size}, guidance {how}, temperature {settings.temperature:g}"
    return f"{line}, denoise {settings.denoise:g}" if settings.denoise else line


def _print_result(plan: GenerationPlan, path: str, num_units: int, quality: Quality, errors: list[float]) -> None:
    if errors:
        amplifies = max(errors) > _EXACT
        print(
            f"images encode back to their latents within {max(errors):.1e}"
            + (": this model amplifies rounding; use fp32, or exact decoding, for accuracy" if amplifies else "")
        )
    if plan.vectors is not None:
        redrawn = f"{quality.redrawn} of them drawn again (not finite)"
        print(f"{path}: {plan.num_images} vectors in {num_units} shards, {redrawn}")
        return
    clipped = quality.outside / max(quality.values, 1)
    print(
        f"{quality.redrawn} images drawn again ({quality.not_finite} not finite, {quality.saturated} saturated); "
        f"{clipped:.2%} of all values were clipped by more than a level"
        + ("; that is a large share: lower sampling.temperature, or train longer" if clipped > _MUCH_CLIPPED else "")
    )
    print(f"{path}: {plan.num_images} images in {num_units} shard{'s' * (num_units > 1)}; look at {path}/{_GRID}")
