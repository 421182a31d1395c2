"""Verb ``generate``: a registered version to shards of new images, in the format that ``prepare`` writes.

Resolve everything that decides the bytes into a plan, freeze it in the output folder, and make each shard as one
idempotent unit of work: decode its range of indices, record its digests, write it, read it back. The manifest comes
last. Running it again makes what is missing, byte for byte; a folder that holds another plan is refused. Several
drivers may work on one folder: each begins elsewhere and passes over what others have made.

Writes into ``shards.path``: ``plan.json`` first, the tars with their indexes, ``quality.json``, ``manifest.json``, and
``grid.png`` where there is something to look at. A shard that was made again with other bytes is an error, and so are
more bad samples than ``sampling.guard`` allows. ``--calibrate`` measures decoding instead, and writes an event.
"""

import functools
import random
from typing import Any

import torch

from tarflow_scale import storage
from tarflow_scale.config.generate import GenerateConfig
from tarflow_scale.config.sampling import DecoderConfig, GuardConfig, SamplingConfig
from tarflow_scale.density.picture import density_picture
from tarflow_scale.errors import ConfigError, NumericsError, PlanError
from tarflow_scale.loading import calibration_for, load_version, worker_device
from tarflow_scale.pool import Pool
from tarflow_scale.records import GenerationPlan, VectorFacts, canonical_json, changes
from tarflow_scale.registry import Registry
from tarflow_scale.runtime import console
from tarflow_scale.sampling import Quality, Sampler
from tarflow_scale.sampling import calibrate as measure_decoding
from tarflow_scale.sampling.labels import numbered
from tarflow_scale.shards.export import check_folder, write_folder
from tarflow_scale.shards.images import contact_sheet
from tarflow_scale.shards.manifest import MANIFEST_NAME, Manifest, ShardRecord, read_manifest
from tarflow_scale.shards.npz import check_npz, write_npz
from tarflow_scale.shards.reader import ShardSet
from tarflow_scale.shards.vectors import VALUES
from tarflow_scale.shards.writer import publish_manifest
from tarflow_scale.verbs.generate.worker import UNIT_FOLDERS, ShardMaker, ShardUnit, is_done, read_quality, read_record

__all__ = ["calibrate", "resolved_plan", "run"]

_PLAN = "plan.json"
_QUALITY = "quality.json"
_GRID = "grid.png"
_GRID_IMAGES = 100
_GRID_COLUMNS = 10
_GRID_ZOOM = 6
_GRID_PIXELS = 1000
"""Its width, if that is possible."""
_EXACT = 1e-3
"""Latents and what their images encode to differ by less, in fp32, unless the model amplifies rounding."""
_MUCH_CLIPPED = 0.05
_FEW = 3
"""Images that chance alone may have drawn again, however few are made."""


def run(config: GenerateConfig, dry_run: bool) -> None:
    """Make the shards that are missing, then the manifest.

    Raises:
        RegistryError: no such version.
        PlanError: the folder holds another plan, or a shard that was made again has other bytes.
        DataError: ``shards.folder`` or ``shards.npz`` holds another data set.
    """
    plan = resolved_plan(config)
    units = _units(plan)
    path = config.shards.path
    _check_plan(config, plan)
    _check_also(config)
    missing = [unit for unit in units if not is_done(path, unit)]
    _print_plan(plan, len(units), len(missing), config)
    if dry_run:
        return
    storage.create(storage.join(path, _PLAN), plan.to_json())
    _check_plan(config, plan)  # another driver may have been faster
    last = (MANIFEST_NAME, _GRID) if plan.has_grid else (MANIFEST_NAME,)
    if not missing and all(storage.exists(storage.join(path, name)) for name in last):
        print(f"{path}: nothing to do, all {plan.num_images} images are there")
        _also(config)
        return
    total = plan.num_images
    made = [read_quality(path, unit) for unit in units if unit not in missing]
    quality = functools.reduce(Quality.plus, made, Quality())
    _check_redrawn(quality, plan)
    errors: list[float] = []
    begin = random.randrange(len(missing)) if missing else 0  # noqa: S311 - so that two drivers do not meet
    arguments = {"registry": config.registry.path, "plan": plan, "path": path}
    bar = console.progress_bar(total, "generate", initial=_images(units) - _images(missing))
    with Pool(**config.cluster.model_dump()) as pool, bar:
        for unit, (found, error) in pool.run(ShardMaker, arguments, missing[begin:] + missing[:begin]):
            bar.update(unit.stop - unit.start)
            errors += [] if error is None else [error]
            quality = quality.plus(found)
            if quality.redrawn:
                bar.tell(f"{quality.redrawn:,} drawn again")
            _check_redrawn(quality, plan)
    storage.write_bytes(storage.join(path, _QUALITY), quality.to_json())
    for folder in UNIT_FOLDERS:
        storage.remove_abandoned(storage.join(path, folder))
    publish_manifest(path, _manifest(plan, tuple(read_record(path, unit) for unit in units)))
    _write_grid(config.registry.path, path, plan)
    if errors:
        amplifies = max(errors) > _EXACT
        print(
            f"images encode back to their latents within {max(errors):.1e}"
            + (": this model amplifies rounding; fp32, or exact decoding, is the more accurate" if amplifies else "")
        )
    if plan.is_of_vectors:
        print(f"{path}: {total} vectors in {len(units)} shards, {quality.redrawn} of them drawn again (not finite)")
        return
    clipped = quality.outside / max(quality.values, 1)
    print(
        f"{quality.redrawn} images drawn again ({quality.not_finite} not finite, {quality.saturated} saturated); "
        f"{clipped:.2%} of all values were clipped by more than a level"
        + ("; that is much: lower sampling.temperature, or train longer" if clipped > _MUCH_CLIPPED else "")
    )
    print(f"{path}: {plan.num_images} images in {len(units)} shard{'s' * (len(units) > 1)}; look at {path}/{_GRID}")
    _also(config)


def _check_redrawn(quality: Quality, plan: GenerationPlan) -> None:
    guard, total = GuardConfig.model_validate(plan.guard), plan.num_images
    allowed = max(guard.most_redrawn_share * total, _FEW if guard.most_redrawn_share else 0)
    if quality.redrawn > allowed:
        lower = "sampling.temperature" + (" or sampling.guidance.scale" if plan.sampling["guidance"]["scale"] else "")
        raise NumericsError(
            f"{quality.redrawn} of {quality.images} images were drawn again ({quality.not_finite} not finite, "
            f"{quality.saturated} saturated; sampling.guard.most_redrawn_share={guard.most_redrawn_share:g} allows "
            f"{allowed:.0f} of {total}); lower {lower} in another shards.path, train longer or with "
            f"model.log_scale_bound, or allow more"
        )


def _check_also(config: GenerateConfig) -> None:
    """Refuse what `_also` would refuse, or write over, before any work."""
    shards = config.shards
    is_made = storage.exists(storage.join(shards.path, MANIFEST_NAME))
    digest = read_manifest(shards.path).digest if is_made else None
    if shards.folder is not None:
        if shards.folder.rstrip("/") == shards.path.rstrip("/"):
            raise ConfigError(f"shards.folder must not be shards.path (got {shards.folder}); choose another")
        check_folder(shards.folder, digest)
    if shards.npz is not None:
        check_npz(shards.npz, digest)


def _also(config: GenerateConfig) -> None:
    """What else is made of the finished shards."""
    if config.shards.folder is not None:
        print(f"{config.shards.folder}: {write_folder(config.shards.path, config.shards.folder)} images as files")
    if config.shards.npz is not None:
        print(f"{config.shards.npz}: {write_npz(config.shards.path, config.shards.npz)} images")


def calibrate(config: GenerateConfig, dry_run: bool) -> None:
    """Measure on this machine how the version is decoded fastest with these settings, and store the plan with it.

    Raises:
        RegistryError: no such version.
        ConfigError: settings that do not fit the model, or no TarFlow.
    """
    registry = Registry(config.registry.path, config.registry.model)
    version = registry.resolve(config.registry.version)
    torch.set_num_threads(config.cluster.cpus_per_worker)
    flow = load_version(config.registry.path, config.registry.model, version.version)
    flow = flow.to(worker_device(config.cluster.gpus_per_worker > 0))
    settings = _settings(config)
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
    print(console.table(rows, ("block, as decoded", "how", "iterations")))
    where = f"{config.registry.model}@{version.version} on {plan.device}, batch {plan.batch_size}"
    exact = f"{plan.batch_size / plan.exact_seconds:.3g} images/s"
    if all(block.chunk == 1 for block in plan.blocks):
        print(f"{where}: exact decoding is the fastest, {exact}")
        return
    print(
        f"{where}: {plan.batch_size / plan.adaptive_seconds:.3g} images/s, exact {exact}; "
        f"largest error {plan.max_error:.2g}, {plan.pixels_within_one_level:.4%} of pixels within one level"
    )


def resolved_plan(config: GenerateConfig) -> GenerationPlan:
    """Everything that decides the bytes, resolved once.

    Raises:
        UserError: no such version; settings that do not fit the model.
    """
    registry = Registry(config.registry.path, config.registry.model)
    version = registry.resolve(config.registry.version)
    flow = load_version(config.registry.path, config.registry.model, version.version)
    settings, cluster = _settings(config), config.cluster
    if flow.num_conditions is not None:
        raise ConfigError(
            f"generate has no numbers to condition on (got a flow that takes {flow.num_conditions}); in Python, "
            f"flow.sample(n, y) takes them"
        )
    of_images = (config.shards.folder, config.shards.npz, config.sampling.guard.saturated_share)
    if version.data.vectors is not None and any(setting is not None for setting in of_images):
        raise ConfigError(
            "shards.folder, shards.npz and sampling.guard.saturated_share are for images (got a model of vectors); "
            "leave them out"
        )
    decoding = calibration_for(registry, version.version, settings, cluster.gpus_per_worker > 0)
    rule = numbered(config.sampling.labels, version.data.class_names)
    sampler = Sampler(flow, config.sampling.seed, settings, decoding, rule)  # refuses what does not fit the model
    if settings.batch_size is None:
        if cluster.gpus_per_worker:
            raise ConfigError("sampling.batch_size decides the last bits of images, so generate needs a number on GPUs")
        frozen = storage.read_if_there(storage.join(config.shards.path, _PLAN))  # what fitted when it was made
        own = None if frozen is None else GenerationPlan.from_json(frozen, _PLAN).sampling.get("batch_size")
        fitting = own or max(1, sampler.batch_size // cluster.num_workers)
        settings = settings.model_copy(update={"batch_size": fitting})
    return GenerationPlan(
        model=config.registry.model,
        version=version.version,
        weights_digest=version.weights_digest,
        seed=config.sampling.seed,
        num_images=config.sampling.num_images,
        samples_per_shard=config.shards.samples_per_shard,
        sampling=settings.model_dump(mode="json"),
        labels=rule if flow.num_classes else "none",
        class_names=version.data.class_names,
        image_size_pixels=version.data.image_size_pixels,
        num_channels=version.data.num_channels,
        pixels=version.pixels,
        device="cuda" if config.cluster.gpus_per_worker else "cpu",
        threads=config.cluster.cpus_per_worker,
        decoding=decoding,
        codec=config.shards.codec,
        jpeg_quality=config.shards.jpeg_quality,
        guard=config.sampling.guard.model_dump(mode="json"),
    )


def _settings(config: GenerateConfig) -> SamplingConfig:
    own = {"seed", "num_images", "labels", "guard"}
    return SamplingConfig.model_validate(config.sampling.model_dump(exclude=own))


def _units(plan: GenerationPlan) -> list[ShardUnit]:
    size = plan.samples_per_shard
    starts = range(0, plan.num_images, size)
    return [ShardUnit(number, start, min(start + size, plan.num_images)) for number, start in enumerate(starts)]


def _images(units: list[ShardUnit]) -> int:
    return sum(unit.stop - unit.start for unit in units)


def _check_plan(config: GenerateConfig, plan: GenerationPlan) -> None:
    """Refuse a folder that holds another plan, or anything that is not a generation."""
    path = config.shards.path
    location = storage.join(path, _PLAN)
    if storage.exists(location):
        frozen = GenerationPlan.from_json(storage.read_bytes(location), location)
        before, now = ({name: _of(one, name) for name in GenerationPlan.model_fields} for one in (frozen, plan))
        if changed := changes(before, now):
            also = [f"shards.{name}" for name in ("folder", "npz") if getattr(config.shards, name) is not None]
            others = " and ".join(["shards.path", *also])
            raise PlanError(f"{path} holds another plan ({changed}); choose another {others}")
    elif any(not name.endswith(storage.PARTIAL) for name in storage.list_names(path)):
        if storage.exists(location):  # another driver was faster
            _check_plan(config, plan)
            return
        raise PlanError(f"{path} holds other files (no {_PLAN}); choose another shards.path")


def _of(plan: GenerationPlan, name: str) -> Any:
    """A field; settings that an older version did not know of are at their defaults."""
    if name == "guard":
        return GuardConfig.model_validate(plan.guard).model_dump()
    return SamplingConfig.model_validate(plan.sampling).model_dump() if name == "sampling" else getattr(plan, name)


def _manifest(plan: GenerationPlan, shards: tuple[ShardRecord, ...]) -> Manifest:
    return Manifest(
        name=plan.model,
        split="generated",
        image_size_pixels=plan.image_size_pixels,
        num_channels=plan.num_channels,
        class_names=() if plan.labels == "none" else plan.class_names,
        bit_depth=plan.pixels.bit_depth,
        codec=VALUES if plan.is_of_vectors else plan.codec,
        vectors=VectorFacts(num_values=plan.num_channels) if plan.is_of_vectors else None,
        source=f"{plan.model}@{plan.version} {plan.weights_digest}",
        recipe=storage.digest(canonical_json(plan.model_dump(mode="json"))),
        shards=shards,
    )


def _write_grid(registry: str, path: str, plan: GenerationPlan) -> None:
    """The first images as one picture; of up to 20 classes, a column shows one. Of two numbers their density."""
    if plan.is_of_vectors:
        if plan.has_grid:
            flow = load_version(registry, plan.model, plan.version)
            storage.write_bytes(storage.join(path, _GRID), density_picture(flow, plan.seed))
        return
    classes = len(plan.class_names)
    columns = classes * max(1, _GRID_COLUMNS // classes) if 0 < classes <= 2 * _GRID_COLUMNS else _GRID_COLUMNS
    zoom = max(1, min(_GRID_ZOOM, _GRID_PIXELS // (columns * (plan.image_size_pixels + 1))))
    batch = next(ShardSet(path).batches(0, min(_GRID_IMAGES, plan.num_images), _GRID_IMAGES))
    labelled = plan.labels != "none" and plan.class_names
    names = [plan.class_names[label] for label in batch.labels] if labelled else None
    storage.write_bytes(storage.join(path, _GRID), contact_sheet(batch.images, columns, zoom, names))


def _print_plan(plan: GenerationPlan, num_units: int, num_missing: int, config: GenerateConfig) -> None:
    size = f"{plan.num_channels}x{plan.image_size_pixels}x{plan.image_size_pixels}"
    shape = f"{plan.num_channels} numbers" if plan.is_of_vectors else size
    rows = [
        ("model", f"{plan.model}@{plan.version}, weights {plan.weights_digest[:12]}"),
        ("samples", f"{plan.num_images:,} of {shape}, {_labels_in_words(plan)}, seed {plan.seed}"),
        ("sampling", _settings_line(SamplingConfig.model_validate(plan.sampling))),
        ("shards", f"{num_units} of up to {plan.samples_per_shard} images, {num_missing} to make"),
        ("output", config.shards.path),
    ]
    also = {"files": config.shards.folder, "npz": config.shards.npz}
    rows += [(name, place) for name, place in also.items() if place is not None]
    print(console.table(rows, ("generate", "")))


def _labels_in_words(plan: GenerationPlan) -> str:
    match plan.labels:
        case "balanced" | "none":
            return f"{plan.labels} labels"
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
