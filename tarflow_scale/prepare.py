"""Verb ``prepare``: images to WebDataset shards.

Open the source, split it (as it says, or by class), pack each split in a random order into tars with an index beside
each, and publish the manifests last, when all splits are packed. The same source and configuration give the same
bytes. What fails half-way leaves nothing.
"""

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tarflow_scale import storage, telemetry
from tarflow_scale.config import PrepareConfig, SplitConfig
from tarflow_scale.errors import DataError
from tarflow_scale.randomness import Purpose, permutation
from tarflow_scale.records import canonical_json
from tarflow_scale.shards.manifest import MANIFEST_NAME, Manifest, read_manifest
from tarflow_scale.shards.sources import ImageSource, open_source
from tarflow_scale.shards.writer import Sample, publish_manifest, write_shard

__all__ = ["run"]


def run(config: PrepareConfig, dry_run: bool) -> None:
    """Pack the splits of the source, unless they are packed already.

    Raises:
        DataError: the source is unsuitable, or the target holds another data set.
    """
    source = open_source(config.source)
    settings = config.model_dump(mode="json", exclude={"shards": {"path"}})
    recipe = storage.digest(canonical_json([settings, source.digest]))
    splits = _split(source, config.split)
    _print_plan(source, splits, config)
    if dry_run:
        return
    missing = [split for split in splits if not _already_there(_path(config, split), split, recipe)]
    if not missing:
        print(f"{config.shards.path}: nothing to do, this data set is packed")
        return
    try:
        manifests = {split: _pack(source, splits[split], split, recipe, config) for split in missing}
    except BaseException:
        for split in missing:
            _clear(_path(config, split), split)
        raise
    for split, manifest in manifests.items():
        path = _path(config, split)
        publish_manifest(path, manifest)
        print(f"{path}: {manifest.num_images} images in {len(manifest.shards)} shards, manifest {manifest.digest[:12]}")


def _path(config: PrepareConfig, split: str) -> str:
    return storage.join(config.shards.path, split)


def _split(source: ImageSource, config: SplitConfig) -> dict[str, NDArray[np.int64]]:
    """Numbers of the images of each split."""
    if config.kind == "official" and source.official_test is None:
        raise DataError(f"{source.name} has no official split (got split.kind=official); use stratified")
    if config.kind == "stratified" or source.official_test is None:
        in_test = _stratified(source.labels, config.test_fraction, config.seed)
    else:
        in_test = source.official_test
    splits = {"train": np.flatnonzero(~in_test), "test": np.flatnonzero(in_test)}
    return {name: members for name, members in splits.items() if len(members)}


def _stratified(labels: NDArray[np.int64], test_fraction: float, seed: int) -> NDArray[np.bool_]:
    """Which images are for testing; each class gives the same share."""
    test: list[NDArray[np.int64]] = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        chosen = permutation(len(members), Purpose.SPLIT, seed, int(label))[: round(len(members) * test_fraction)]
        test.append(members[chosen])
    return np.isin(np.arange(len(labels)), np.concatenate(test))


def _print_plan(source: ImageSource, splits: dict[str, NDArray[np.int64]], config: PrepareConfig) -> None:
    channels, height, width = source.image(0).shape
    size = f"{channels}x{height}x{width}, {source.bit_depth} bit"
    rows = [
        (name, str(len(members)), str(-(-len(members) // config.shards.samples_per_shard)), size)
        for name, members in splits.items()
    ]
    print(f"{source.name}: {len(source)} images, {len(source.class_names)} classes -> {config.shards.path}")
    print(telemetry.table(rows, ("split", "images", "shards", "image")))


def _already_there(path: str, split: str, recipe: str) -> bool:
    if not storage.exists(storage.join(path, MANIFEST_NAME)):
        foreign = [name for name in storage.list_names(path) if not _is_ours(name, split)]
        if foreign:
            raise DataError(f"{path} holds other files (got {foreign[0]}); choose another shards.path")
        return False
    if read_manifest(path).recipe != recipe:
        raise DataError(f"{path} holds another data set; choose another shards.path or delete it")
    return True


def _is_ours(name: str, split: str) -> bool:
    """Whether a file is of an interrupted packing of this split."""
    return re.fullmatch(rf"{split}-\d{{5}}(\.tar|\.index\.npz)|\.[0-9a-f]{{32}}\.partial", name) is not None


def _clear(path: str, split: str) -> None:
    """Remove what an interrupted packing left, and the folder if nothing else is in it."""
    names = storage.list_names(path)
    ours = [name for name in names if _is_ours(name, split)]
    for name in ours:
        storage.remove(storage.join(path, name))
    if names and len(ours) == len(names):
        storage.remove_tree(path)


def _pack(source: ImageSource, members: NDArray[np.int64], split: str, recipe: str, config: PrepareConfig) -> Manifest:
    """Write the shards of a split and return the manifest that will make them a data set."""
    path = _path(config, split)
    order = members[permutation(len(members), Purpose.PACK_ORDER, config.split.seed)]
    size = config.shards.samples_per_shard
    _clear(path, split)
    with telemetry.progress_bar(len(order), f"prepare {split}") as bar:
        shards = [
            write_shard(
                path,
                f"{split}-{number:05d}.tar",
                _samples(source, order[number * size : (number + 1) * size], number * size, bar),
            )
            for number in range(-(-len(order) // size))
        ]
    channels, height, _ = source.image(int(order[0])).shape
    return Manifest(
        name=source.name,
        split=split,
        image_size_pixels=height,
        num_channels=channels,
        class_names=source.class_names,
        bit_depth=source.bit_depth,
        source=source.description,
        recipe=recipe,
        shards=tuple(shards),
    )


def _samples(source: ImageSource, numbers: NDArray[np.int64], first: int, bar: Any) -> Iterator[Sample]:
    for place, number in enumerate(numbers):
        bar.update(1)
        yield Sample(
            key=f"{first + place:08d}",
            image=source.image(int(number)),
            label=int(source.labels[number]),
            facts={"origin": source.origin(int(number))},
        )
