"""Use tars of another program as a data set without copying: write an index beside each tar, then the manifest."""

from tarflow_scale import storage
from tarflow_scale.config.prepare import PackedShardsConfig, SourceConfig
from tarflow_scale.errors import DataError
from tarflow_scale.shards.manifest import MANIFEST_NAME, index_name, read_manifest
from tarflow_scale.shards.sources.tar_index import index_tars
from tarflow_scale.shards.writer import publish_manifest
from tarflow_scale.verbs.prepare.preview import print_ignored

__all__ = ["index_in_place"]


def index_in_place(config: SourceConfig, shards: PackedShardsConfig, dry_run: bool) -> None:
    """Index the tars in ``shards.path``, unless they are indexed already.

    Raises:
        DataError: the tars cannot be used in place, or differ from the tars that were indexed.
    """
    path = shards.path
    if storage.exists(storage.join(path, MANIFEST_NAME)):
        _check_same_tars(path)
        print(f"{path}: nothing to do, this is already a data set")
        return
    manifest, indexes, ignored = index_tars(config, shards.num_workers)
    print(f"{path}: {manifest.num_images} images of {manifest.event.size} in {len(manifest.shards)} tars")
    print_ignored(ignored)
    if dry_run:
        return
    for record, index in zip(manifest.shards, indexes, strict=True):
        storage.write_bytes(storage.join(path, index_name(record.file)), index)
    publish_manifest(path, manifest)
    print(f"{path}: indexed in place, {manifest.num_classes} classes, manifest {manifest.digest[:12]}")


def _check_same_tars(path: str) -> None:
    known = {shard.file: shard.bytes for shard in read_manifest(path).shards}
    present = {name: size for name, size in storage.list_sizes(path).items() if name.endswith(".tar")}
    changed = sorted(name for name in known.keys() | present if known.get(name) != present.get(name))
    if changed:
        raise DataError(
            f"the tars in {path} must match its manifest (got {changed[0]}, which is new, missing or changed); delete "
            f"{MANIFEST_NAME} to index the tars again"
        )
