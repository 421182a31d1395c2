"""Tars that others wrote become a data set where they are: an index beside each, and the manifest last."""

from tarflow_scale import storage
from tarflow_scale.config.prepare import PackedShardsConfig, SourceConfig
from tarflow_scale.errors import DataError
from tarflow_scale.shards.manifest import AS_FOUND, MANIFEST_NAME, Manifest, index_name, read_manifest
from tarflow_scale.shards.sources.source import reading_of
from tarflow_scale.shards.sources.tar_index import index_tars
from tarflow_scale.shards.writer import publish_manifest
from tarflow_scale.verbs.prepare.preview import print_ignored

__all__ = ["index_in_place"]


def index_in_place(config: SourceConfig, shards: PackedShardsConfig, dry_run: bool) -> None:
    """Index the tars of ``shards.path``, unless that is done.

    Raises:
        DataError: the tars cannot be a data set as they are, or are not those that were indexed.
    """
    path = shards.path
    if storage.exists(storage.join(path, MANIFEST_NAME)):
        _check_same_tars(path)
        print(f"{path}: nothing to do, this is a data set")
        return
    reading = reading_of(config)
    indexed = index_tars(config, reading, shards.num_workers)
    manifest = Manifest(
        name=storage.base_name(path),
        split="train",
        image_size_pixels=indexed.size_pixels,
        num_channels=indexed.num_channels,
        class_names=indexed.class_names,
        bit_depth=8,
        codec=AS_FOUND,
        source="WebDataset tars, indexed in place",
        recipe=storage.digest(b"".join(indexed.indexes)),
        shards=indexed.records,
        reading=reading,
    )
    print(f"{path}: {manifest.num_images} images {manifest.event.shape} in {len(manifest.shards)} tars")
    print_ignored(indexed.ignored)
    if dry_run:
        return
    for record, index in zip(indexed.records, indexed.indexes, strict=True):
        storage.write_bytes(storage.join(path, index_name(record.file)), index)
    publish_manifest(path, manifest)
    print(f"{path}: indexed in place, {manifest.num_classes} classes, manifest {manifest.digest[:12]}")


def _check_same_tars(path: str) -> None:
    known = {shard.file: shard.bytes for shard in read_manifest(path).shards}
    present = {name: size for name, size in storage.list_sizes(path).items() if name.endswith(".tar")}
    changed = sorted(name for name in known.keys() | present if known.get(name) != present.get(name))
    if changed:
        raise DataError(
            f"{path} has other tars than its manifest names (got {changed[0]} new, gone or changed); delete "
            f"{MANIFEST_NAME} to index them again"
        )
