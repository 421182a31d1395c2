"""Verb ``encode``: turn packed images into latents of a registered autoencoder, as shards that ``train`` reads.

Each shard of images becomes one shard of latents with the same name, samples, keys and labels; it is one idempotent
unit of work. A worker encodes it, stores its digests and sums, writes it and reads it back. When all shards are there,
the driver computes mean and scale of every channel over the training split, and writes the manifests. The same command
again encodes what is missing, byte for byte.

Reads the autoencoder from the registry, and the images at ``data.path``: one split, or all splits that ``prepare``
wrote. Writes into ``shards.path``. Refuses images that the autoencoder cannot encode, and a folder that holds other
latents.
"""

import json
import math
from collections.abc import Mapping

import torch

from tarflow_scale import storage
from tarflow_scale.autoencoders.contract import Autoencoder
from tarflow_scale.config.cluster import ClusterConfig
from tarflow_scale.config.encode import EncodeConfig, EncodingConfig
from tarflow_scale.config.versions import VersionConfig
from tarflow_scale.errors import ConfigError, DataError
from tarflow_scale.loading import load_autoencoder
from tarflow_scale.pool import Pool
from tarflow_scale.records import LatentFacts, ModelVersion, canonical_json, changes
from tarflow_scale.registry import Registry
from tarflow_scale.runtime import console
from tarflow_scale.shards.events import ImageEvent, LatentEvent
from tarflow_scale.shards.manifest import MANIFEST_NAME, Manifest
from tarflow_scale.shards.reader import ShardSet
from tarflow_scale.shards.sources.splits import PACKED
from tarflow_scale.shards.writer import publish_manifest
from tarflow_scale.verbs.encode.worker import ChannelSums, EncodedUnit, ShardEncoder, recorded

__all__ = ["run"]

_PLAN = "plan.json"
_LEAST_SCALE = 1e-6
"""A channel with a smaller deviation is constant."""
Splits = dict[str, Manifest]
"""Manifests of the splits of images, by their folder below ``data.path``, training first; the folder of a single split
is empty."""


def run(config: EncodeConfig, dry_run: bool) -> None:
    """Encode the shards that are missing, then write the manifests.

    Raises:
        RegistryError: no such version.
        DataError: the images do not fit the autoencoder, or the folder holds other files or other latents.
        NumericsError: a latent is not finite.
    """
    registry = Registry(config.registry.path, config.registry.model)
    version = registry.resolve(config.registry.version)
    autoencoder, digest = load_autoencoder(registry.path, registry.model, version.version)
    splits = _splits(config.data.path)
    facts = _facts(splits, autoencoder, digest, config.encoding)
    plan = _plan(config.registry, version, splits, config.encoding, config.cluster)
    path = config.shards.path
    _check_plan(path, plan)
    units = [
        EncodedUnit(storage.join(config.data.path, name), storage.join(path, name), number, shard.file, shard.samples)
        for name, manifest in splits.items()
        for number, shard in enumerate(manifest.shards)
    ]
    missing = [unit for unit in units if not recorded(unit.latents).is_done(unit.tar_name)]
    _print_plan(config.registry, version, splits, facts, len(units), len(missing), path)
    if dry_run:
        return
    storage.create(storage.join(path, _PLAN), plan)
    _check_plan(path, plan)  # another driver may have created its own first
    if not missing and all(storage.exists(storage.join(path, name, MANIFEST_NAME)) for name in splits):
        print(f"{path}: nothing to do, all latents are there")
        return
    arguments = {
        "registry": registry.path,
        "model": registry.model,
        "version": version.version,
        "encoding": config.encoding,
        "facts": facts,
        "threads": config.cluster.cpus_per_worker,
        "gpu": config.cluster.gpus_per_worker > 0,
    }
    with Pool(**config.cluster.model_dump()) as pool:
        for _ in pool.run_missing(ShardEncoder, arguments, units, missing, "encode"):
            pass  # the results are the shards
    _publish(path, splits, facts, f"{registry.model}@{version.version}", storage.digest(plan))


def _splits(path: str) -> Splits:
    """The splits of images below a folder.

    Raises:
        DataError: there is none, or one of them does not hold images.
    """
    if storage.exists(storage.join(path, MANIFEST_NAME)):
        names = [""]
    else:
        names = [name for name in PACKED if storage.exists(storage.join(path, name, MANIFEST_NAME))]
    splits = {name: ShardSet(storage.join(path, name)).manifest for name in names}
    if not splits:
        raise DataError(f"{path} holds no packed images (no {MANIFEST_NAME}); name the folder that prepare wrote")
    for manifest in splits.values():
        if not isinstance(manifest.event, ImageEvent):
            raise DataError(
                f"encode is for images (got {manifest.event} in {manifest.name}/{manifest.split}); name a data set of "
                f"images"
            )
    return splits


def _facts(splits: Splits, autoencoder: Autoencoder, digest: str, encoding: EncodingConfig) -> LatentFacts:
    """The latents, without mean and scale, which are measured.

    Raises:
        DataError: the autoencoder cannot encode the images.
    """
    first = next(iter(splits.values()))
    try:
        shape = autoencoder.latent_shape(first.event.carried_shape)
    except ValueError as error:
        raise DataError(f"{first.name}: {error}") from error
    with torch.no_grad():
        has_variance = autoencoder.encode(torch.zeros(1, *first.event.carried_shape)).log_var is not None
    return LatentFacts(
        autoencoder=digest,
        shape=shape,
        image_shape=first.event.carried_shape,
        bit_depth=first.bit_depth,
        has_variance=has_variance,
        dtype=encoding.dtype,
        has_mirrored=encoding.mirrored,
        mean=(0.0,) * shape[0],
        scale=(1.0,) * shape[0],
    )


def _plan(
    registry: VersionConfig, version: ModelVersion, splits: Splits, encoding: EncodingConfig, cluster: ClusterConfig
) -> bytes:
    """Everything that decides the bytes, as canonical JSON."""
    return canonical_json(
        {
            "autoencoder": f"{registry.model}@{version.version}",
            "weights_digest": version.weights_digest,
            "images": {name or manifest.split: manifest.digest for name, manifest in splits.items()},
            "encoding": encoding.model_dump(mode="json"),
            "device": "cuda" if cluster.gpus_per_worker else "cpu",
            "threads": cluster.cpus_per_worker,
        }
    )


def _check_plan(path: str, plan: bytes) -> None:
    """Refuse a folder that holds other latents, or anything else."""
    location = storage.join(path, _PLAN)
    content = storage.read_if_there(location)
    if content is None:
        if any(not name.endswith(storage.PARTIAL) for name in storage.list_names(path)):
            raise DataError(f"{path} holds other files (no {_PLAN}); choose another shards.path")
        return
    if changed := changes(json.loads(content), json.loads(plan)):
        raise ConfigError(f"{path} holds other latents ({changed}); choose another shards.path")


def _publish(path: str, splits: Splits, facts: LatentFacts, autoencoder: str, recipe: str) -> None:
    """Write the manifests, which hold mean and scale of every channel over the first split."""
    first = next(iter(splits))
    sums = [_sums_of(storage.join(path, first), shard.file) for shard in splits[first].shards]
    mean, scale = _mean_and_scale(sums)
    event = LatentEvent(facts.model_copy(update={"mean": mean, "scale": scale}))
    for name, images in splits.items():
        target = storage.join(path, name)
        shards = recorded(target)
        shards.remove_abandoned()
        manifest = Manifest(
            name=images.name,
            split=images.split,
            class_names=images.class_names,
            codec=event.codec(""),
            source=f"latents of {autoencoder} of {images.name}/{images.split} {images.digest}",
            recipe=recipe,
            shards=tuple(shards.record(shard.file) for shard in images.shards),
            **event.fields(),
        )
        publish_manifest(target, manifest)
        print(f"{target}: {manifest.num_images:,} {manifest.event}, manifest {manifest.digest[:12]}")


def _sums_of(path: str, tar_name: str) -> ChannelSums:
    content = recorded(path).note(tar_name)
    if content is None:
        raise DataError(f"{path} has no sums of {tar_name}; delete {tar_name} and run encode again")
    return ChannelSums.from_json(content, f"{path}/{tar_name}")


def _mean_and_scale(sums: list[ChannelSums]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of every channel of draws from the latents."""
    num = sum(part.num for part in sums)
    means = [math.fsum(values) / num for values in zip(*(part.total for part in sums), strict=True)]
    squares = [math.fsum(values) / num for values in zip(*(part.squares for part in sums), strict=True)]
    variances = [max(square - mean**2, 0.0) for mean, square in zip(means, squares, strict=True)]
    return tuple(means), tuple(max(math.sqrt(variance), _LEAST_SCALE) for variance in variances)


def _print_plan(
    registry: VersionConfig,
    version: ModelVersion,
    splits: Mapping[str, Manifest],
    facts: LatentFacts,
    num_units: int,
    num_missing: int,
    path: str,
) -> None:
    first = next(iter(splits.values()))
    images = ", ".join(f"{manifest.split} {manifest.num_images:,}" for manifest in splits.values())
    event = LatentEvent(facts)
    size = math.prod(event.carried_shape)
    rows = [
        ("autoencoder", f"{registry.model}@{version.version}, {version.parameters:,} parameters"),
        ("images", f"{first.name}, {first.event}: {images}"),
        ("latents", f"{event.size}, {facts.dtype}, {size:,} bytes for {math.prod(first.event.carried_shape):,}"),
        ("shards", f"{num_units}, {num_missing} to encode"),
        ("output", path),
    ]
    print(console.table(rows, ("encode", "")))
