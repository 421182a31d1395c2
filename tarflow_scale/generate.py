"""Verb ``generate``: a registered version to shards of new images, in the format that ``prepare`` writes.

Resolve everything that decides the bytes into a plan, freeze it in the output folder, and make each shard as one
idempotent unit of work: decode its range of indices, record its digests, write it. The manifest comes last.
Running it again makes what is missing, byte for byte; a folder that holds another plan is refused.
"""

from dataclasses import dataclass
from typing import Any

import torch

from tarflow_scale import storage, telemetry
from tarflow_scale.config import DecoderConfig, GenerateConfig, SamplingConfig
from tarflow_scale.errors import ConfigError, PlanError
from tarflow_scale.loading import decoding_plan, load_version, worker_device
from tarflow_scale.pool import Pool
from tarflow_scale.records import GenerationPlan, canonical_json
from tarflow_scale.registry import Registry
from tarflow_scale.sampling import Sampler
from tarflow_scale.sampling import calibrate as measure_decoding
from tarflow_scale.shards.images import contact_sheet
from tarflow_scale.shards.manifest import MANIFEST_NAME, Manifest, ShardRecord, index_name
from tarflow_scale.shards.reader import ShardSet
from tarflow_scale.shards.writer import PackedShard, Sample, publish_manifest

__all__ = ["ShardMaker", "Unit", "calibrate", "run"]

_PLAN = "plan.json"
_RECORDS = "records"
_GRID = "grid.png"
_GRID_IMAGES = 100
_GRID_ZOOM = 6
_EXACT = 1e-3
"""Latents and what their images encode to differ by less, in fp32, unless the model amplifies rounding."""


@dataclass(frozen=True)
class Unit:
    """One output shard: images ``[start, stop)``."""

    number: int
    start: int
    stop: int

    @property
    def tar_name(self) -> str:
        """``generated-00000.tar``."""
        return f"generated-{self.number:05d}.tar"


def run(config: GenerateConfig, dry_run: bool) -> None:
    """Make the shards that are missing, then the manifest.

    Raises:
        RegistryError: no such version.
        PlanError: the folder holds another plan, or a shard that was made again has other bytes.
    """
    plan = _plan(config)
    units = _units(plan)
    path = config.shards.path
    _check_plan(path, plan)
    missing = [unit for unit in units if not _is_done(path, unit)]
    _print_plan(plan, len(units), len(missing), path)
    if dry_run:
        return
    _freeze_plan(path, plan)
    if not missing and storage.exists(storage.join(path, MANIFEST_NAME)):
        print(f"{path}: nothing to do, all {plan.num_images} images are there")
        return
    arguments = {"registry": config.registry.path, "plan": plan, "path": path}
    errors: list[float] = []
    done = _images(units) - _images(missing)
    bar = telemetry.progress_bar(plan.num_images, "generate", initial=done)
    with Pool(**config.cluster.model_dump()) as pool, bar:
        for unit, error in pool.run(ShardMaker, arguments, missing):
            bar.update(unit.stop - unit.start)
            errors += [] if error is None else [error]
    records = tuple(_read_record(path, unit) for unit in units)
    publish_manifest(path, _manifest(plan, records))
    _write_grid(path, plan)
    if errors:
        amplifies = max(errors) > _EXACT
        print(
            f"images encode back to their latents within {max(errors):.1e}"
            + (": this model amplifies rounding; fp32, or exact decoding, is the more accurate" if amplifies else "")
        )
    print(f"{path}: {plan.num_images} images in {len(units)} shards; look at {path}/{_GRID}")


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
    registry.attach_plan(version.version, plan, reason=f"decoding on {plan.device}")
    rows = [
        (str(number), "token by token" if block.chunk == 1 else f"{block.chunk} tokens at once", f"{mean:.1f}")
        for number, (block, mean) in enumerate(zip(plan.blocks, plan.iterations, strict=True), start=1)
    ]
    print(telemetry.table(rows, ("block, as decoded", "how", "iterations")))
    print(
        f"{config.registry.model}@{version.version} on {plan.device}, batch {plan.batch_size}: "
        f"{plan.batch_size / plan.adaptive_seconds:.3g} images/s, exact {plan.batch_size / plan.exact_seconds:.3g}; "
        f"largest error {plan.max_error:.2g}, {plan.pixels_within_one_level:.4%} of pixels within one level"
    )


class ShardMaker:
    """Holds the flow; makes one shard at a time.

    Args:
        registry: folder or URL of the registry.
        plan: the plan.
        path: output folder or URL.
    """

    def __init__(self, registry: str, plan: GenerationPlan, path: str) -> None:
        torch.set_num_threads(plan.threads)
        flow = load_version(registry, plan.model, plan.version).to(worker_device(plan.device == "cuda"))
        self._plan = plan
        self._path = path
        self._sampler = Sampler(flow, plan.seed, SamplingConfig.model_validate(plan.sampling), plan.decoding)

    def run(self, unit: Unit) -> float | None:
        """Make a shard: first the record of what it will be, then index and tar; returns `Sampler.round_trip_error`.

        Raises:
            PlanError: a record from before names other bytes, so this is another machine or library version.
        """
        images = self._sampler.images(range(unit.start, unit.stop)).numpy()
        samples = [self._sample(unit.start + i, image) for i, image in enumerate(images)]
        shard = PackedShard.of(unit.tar_name, samples)
        if not storage.create(_record_location(self._path, unit), shard.record.to_json()):
            earlier = _read_record(self._path, unit)
            if earlier != shard.record:
                raise PlanError(
                    f"{unit.tar_name} came out with other bytes than before (sha256 {shard.record.sha256[:12]}, not "
                    f"{earlier.sha256[:12]}); use the package versions and device of the first run, or another "
                    f"shards.path"
                )
        shard.write(self._path)
        return self._sampler.round_trip_error()

    def _sample(self, index: int, image: Any) -> Sample:
        plan = self._plan
        classes = len(plan.class_names) if plan.labels == "balanced" else 0
        label = index % classes if classes else None
        facts = {
            "index": index,
            "label": label,
            "model": f"{plan.model}@{plan.version}",
            "weights": plan.weights_digest,
            "seed": plan.seed,
            "sampling": plan.sampling,
        }
        return Sample(key=f"{index:09d}", image=image, label=label, facts=facts)


def _plan(config: GenerateConfig) -> GenerationPlan:
    registry = Registry(config.registry.path, config.registry.model)
    version = registry.resolve(config.registry.version)
    flow = load_version(config.registry.path, config.registry.model, version.version)
    settings, cluster = _settings(config), config.cluster
    decoding = decoding_plan(registry, version.version, settings, cluster.gpus_per_worker > 0)
    sampler = Sampler(flow, config.sampling.seed, settings, decoding)  # refuses settings that do not fit the model
    if settings.batch_size is None:
        if cluster.gpus_per_worker:
            raise ConfigError("sampling.batch_size decides the last bits of images, so generate needs a number on GPUs")
        settings = settings.model_copy(update={"batch_size": max(1, sampler.batch_size // cluster.num_workers)})
    return GenerationPlan(
        model=config.registry.model,
        version=version.version,
        weights_digest=version.weights_digest,
        seed=config.sampling.seed,
        num_images=config.sampling.num_images,
        samples_per_shard=config.shards.samples_per_shard,
        sampling=settings.model_dump(mode="json"),
        labels="balanced" if flow.num_classes else "none",
        class_names=version.data.class_names,
        image_size_pixels=version.data.image_size_pixels,
        num_channels=version.data.num_channels,
        pixels=version.pixels,
        device="cuda" if config.cluster.gpus_per_worker else "cpu",
        threads=config.cluster.cpus_per_worker,
        decoding=decoding,
    )


def _settings(config: GenerateConfig) -> SamplingConfig:
    return SamplingConfig.model_validate(config.sampling.model_dump(exclude={"seed", "num_images"}))


def _units(plan: GenerationPlan) -> list[Unit]:
    size = plan.samples_per_shard
    starts = range(0, plan.num_images, size)
    return [Unit(number, start, min(start + size, plan.num_images)) for number, start in enumerate(starts)]


def _images(units: list[Unit]) -> int:
    return sum(unit.stop - unit.start for unit in units)


def _check_plan(path: str, plan: GenerationPlan) -> None:
    """Refuse a folder that holds another plan, or anything that is not a generation."""
    location = storage.join(path, _PLAN)
    if storage.exists(location):
        frozen = GenerationPlan.from_json(storage.read_bytes(location), location)
        changed = [name for name in GenerationPlan.model_fields if _of(frozen, name) != _of(plan, name)]
        if changed:
            raise PlanError(f"{path} holds another plan ({', '.join(changed)} differ); choose another shards.path")
    elif storage.list_names(path):
        raise PlanError(f"{path} holds other files (no {_PLAN}); choose another shards.path")


def _of(plan: GenerationPlan, name: str) -> Any:
    """A field; settings that an older version did not know of are at their defaults."""
    return SamplingConfig.model_validate(plan.sampling) if name == "sampling" else getattr(plan, name)


def _freeze_plan(path: str, plan: GenerationPlan) -> None:
    storage.create(storage.join(path, _PLAN), plan.to_json())
    _check_plan(path, plan)  # another driver may have been faster


def _record_location(path: str, unit: Unit) -> str:
    return storage.join(path, _RECORDS, unit.tar_name.removesuffix(".tar") + ".json")


def _read_record(path: str, unit: Unit) -> ShardRecord:
    location = _record_location(path, unit)
    return ShardRecord.from_json(storage.read_bytes(location), location)


def _is_done(path: str, unit: Unit) -> bool:
    """Whether record, tar and index are there and are what the record says."""
    tar, index = storage.join(path, unit.tar_name), storage.join(path, index_name(unit.tar_name))
    if not all(map(storage.exists, (_record_location(path, unit), tar, index))):
        return False
    record = _read_record(path, unit)
    return _digest(tar) == record.sha256 and _digest(index) == record.index_sha256


def _digest(location: str) -> str:
    with storage.local_copy(location) as copy:
        return storage.digest(copy)


def _manifest(plan: GenerationPlan, shards: tuple[ShardRecord, ...]) -> Manifest:
    return Manifest(
        name=plan.model,
        split="generated",
        image_size_pixels=plan.image_size_pixels,
        num_channels=plan.num_channels,
        class_names=plan.class_names if plan.labels == "balanced" else (),
        bit_depth=plan.pixels.bit_depth,
        source=f"{plan.model}@{plan.version} {plan.weights_digest}",
        recipe=storage.digest(canonical_json(plan.model_dump(mode="json"))),
        shards=shards,
    )


def _write_grid(path: str, plan: GenerationPlan) -> None:
    """The first images as one picture; with up to 20 classes, column c holds class c."""
    columns = len(plan.class_names) if 0 < len(plan.class_names) <= 20 else 10
    batch = next(ShardSet(path).batches(0, min(_GRID_IMAGES, plan.num_images), _GRID_IMAGES))
    storage.write_bytes(storage.join(path, _GRID), contact_sheet(batch.images, columns, _GRID_ZOOM))


def _print_plan(plan: GenerationPlan, num_units: int, num_missing: int, path: str) -> None:
    shape = f"{plan.num_channels}x{plan.image_size_pixels}x{plan.image_size_pixels}"
    rows = [
        ("model", f"{plan.model}@{plan.version}, weights {plan.weights_digest[:12]}"),
        ("images", f"{plan.num_images:,} of {shape}, {plan.labels} labels, seed {plan.seed}"),
        ("sampling", _settings_line(SamplingConfig.model_validate(plan.sampling))),
        ("shards", f"{num_units} of up to {plan.samples_per_shard} images, {num_missing} to make"),
        ("output", path),
    ]
    print(telemetry.table(rows, ("generate", "")))


def _settings_line(settings: SamplingConfig) -> str:
    guidance = settings.guidance
    how = f"{guidance.scale:g}{' annealed' if guidance.annealed else ''}"
    decoder = f"{settings.decoder.kind} in {settings.decoder.precision}"
    line = f"{decoder}, batch {settings.batch_size}, guidance {how}, temperature {settings.temperature:g}"
    return f"{line}, denoise {settings.denoise:g}" if settings.denoise else line
