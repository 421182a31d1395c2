"""Verb ``prepare``: pack images into WebDataset shards.

Open the source, use its splits or hold out a random share of each class, pack each split in random order into tars,
write an index beside each tar, and publish the manifests when all splits are packed. The same source and configuration
give the same bytes with any number of workers. A killed run continues when you repeat it. Bad input leaves no files.

Reads ``source.path`` (a folder, file or URL; nothing for ``digits``). Writes one folder per split, such as
``<shards.path>/train``, with tars, ``*.index.npz``, ``manifest.json``, and ``skipped.jsonl`` or ``dropped.jsonl`` if
images were left out. It is an error if the source cannot be used, if a folder holds other files or another data set, or
if another process is writing to it. To inspect a packed set: ``--check``, ``--stats``, ``--npz``.
"""

from collections.abc import Iterable
from contextlib import nullcontext

import numpy as np
from numpy.typing import NDArray

from tarflow_scale import storage
from tarflow_scale.config.prepare import PackedShardsConfig, PrepareConfig, SourceConfig, SplitConfig
from tarflow_scale.errors import DataError
from tarflow_scale.randomness import Purpose, permutation
from tarflow_scale.runtime.processes import exclusive
from tarflow_scale.shards import copies, inspection, packing
from tarflow_scale.shards.duplicates import Copy
from tarflow_scale.shards.events import ImageEvent
from tarflow_scale.shards.manifest import MANIFEST_NAME, Manifest, read_manifest
from tarflow_scale.shards.npz import write_npz
from tarflow_scale.shards.sources import BadImage, ImageSource, open_source
from tarflow_scale.verbs.prepare.in_place import index_in_place
from tarflow_scale.verbs.prepare.preview import print_preview
from tarflow_scale.verbs.prepare.recipe import recipe_digest
from tarflow_scale.verbs.prepare.split import split_images

__all__ = ["check", "export", "run", "statistics"]


def run(config: PrepareConfig, dry_run: bool) -> None:
    """Pack the splits of the source, unless they are packed already.

    Raises:
        DataError: the source cannot be used, or the target holds another data set or other files.
        StorageError: another ``prepare`` writes to the target.
    """
    try:
        if config.source.in_place:
            index_in_place(config.source, config.shards, dry_run)
        else:
            _prepare(config.source, config.split, config.shards, dry_run)
    except BadImage as error:
        if config.source.bad_images == "skip":
            raise
        raise BadImage(f"{error}, or set source.bad_images=skip to leave out all unusable images") from error


def check(path: str) -> None:
    """``--check``: verify every byte of a packed data set."""
    print(f"{path}: all {inspection.check(path)} samples are intact")


def statistics(path: str) -> None:
    """``--stats``: print a summary of a packed data set."""
    print("\n".join(inspection.statistics(path)))


def export(path: str, location: str) -> None:
    """``--npz``: write a packed data set as the ``.npz`` file that ADM's evaluator reads."""
    event = read_manifest(path).event
    if not isinstance(event, ImageEvent):
        raise DataError(f"--npz works only for images (got {event} in {path}); read the tars instead")
    print(f"{location}: {write_npz(path, location)} images of {path}")


def _prepare(config: SourceConfig, split: SplitConfig, shards: PackedShardsConfig, dry_run: bool) -> None:
    source = open_source(config, split, shards.num_workers)
    recipe = recipe_digest(source, config, split, shards)
    splits = split_images(source, split)
    print_preview(source, splits, split, shards)
    missing = _missing(shards.path, splits, recipe)  # refuses other files and data sets before anything is written
    if dry_run:
        return
    if not missing:
        print(f"{shards.path}: nothing to do, this data set is already packed")
        return
    with nullcontext() if storage.is_remote(shards.path) else exclusive(storage.local(shards.path)):
        missing = _missing(shards.path, splits, recipe)
        dropped = None
        if split.near_duplicates == "drop":
            splits, dropped = copies.without_copies(source, splits, config.bad_images == "skip", shards.num_workers)
        left_out = {name: dropped if name == "train" or dropped is None else [] for name in missing}
        packings = [
            _packing(source, splits[name], name, left_out[name], recipe, config, split, shards) for name in missing
        ]
        _pack(packings, recipe, config.max_bad_fraction, shards.num_workers)


def _missing(path: str, splits: Iterable[str], recipe: str) -> list[str]:
    """Names of the splits that are not packed yet.

    Raises:
        DataError: a folder holds another data set, or files that ``prepare`` did not write.
    """
    missing: list[str] = []
    for name in splits:
        target = storage.join(path, name)
        if not storage.exists(storage.join(target, MANIFEST_NAME)):
            packing.refuse_foreign(target)
            missing.append(name)
        elif read_manifest(target).recipe != recipe:
            raise DataError(f"{target} holds another data set; choose another shards.path, or delete that data set")
    return missing


def _packing(
    source: ImageSource,
    members: NDArray[np.int64],
    name: str,
    dropped: list[Copy] | None,
    recipe: str,
    config: SourceConfig,
    split: SplitConfig,
    shards: PackedShardsConfig,
) -> packing.Packing:
    order = members[permutation(len(members), Purpose.PACK_ORDER, split.seed)]
    return packing.Packing(
        source=source,
        path=storage.join(shards.path, name),
        split=name,
        order=order,
        samples_per_shard=shards.samples_per_shard,
        codec=shards.codec,
        quality=shards.jpeg_quality,
        skip_bad=config.bad_images == "skip",
        digest=storage.digest(f"{recipe} {source.version or source.digest} {name}".encode() + order.tobytes()),
        fingerprints=split.near_duplicates == "report" and isinstance(source.event, ImageEvent),
        dropped=dropped,
    )


def _pack(packings: list[packing.Packing], recipe: str, max_bad_fraction: float, num_workers: int) -> None:
    """Pack all splits, then publish them; on bad input remove all files."""
    for split in packings:
        packing.claim(split.path)
    try:
        notes = [packing.pack(split, num_workers) for split in packings]
        _check_skipped([note for of_split in notes for note in of_split], max_bad_fraction)
        manifests = [_manifest(split, of_split, recipe) for split, of_split in zip(packings, notes, strict=True)]
    except DataError:
        for split in packings:
            packing.clear(split.path)
        raise
    for split, of_split, manifest in zip(packings, notes, manifests, strict=True):
        packing.publish(split, of_split, manifest)
        skipped = sum(len(note.skipped) for note in of_split)
        left_out = f", {skipped} unusable images left out ({split.path}/skipped.jsonl)" if skipped else ""
        shards = f"{len(manifest.shards)} shard{'s' * (len(manifest.shards) > 1)}"
        samples = f"{manifest.num_images} {manifest.event.noun}"
        print(f"{split.path}: {samples} in {shards}, manifest {manifest.digest[:12]}{left_out}")
    if all(split.fingerprints for split in packings):
        copies.report(packings, notes)


def _check_skipped(notes: list[packing.PackNote], max_bad_fraction: float) -> None:
    """Raise an error if too many images were left out, because then the configuration does not fit the images."""
    skipped = [image for note in notes for image in note.skipped]
    total = len(skipped) + sum(note.record.samples for note in notes if note.record is not None)
    if len(skipped) > max_bad_fraction * total:
        raise DataError(
            f"too many images cannot be used (got {len(skipped)} of {total}, allowed: source.max_bad_fraction="
            f"{max_bad_fraction:g}); the first reason is: {skipped[0].reason}"
        )


def _manifest(split: packing.Packing, notes: list[packing.PackNote], recipe: str) -> Manifest:
    source = split.source
    records = tuple(note.record for note in notes if note.record is not None)
    if not records:
        raise DataError(
            f"no image of {source.name} could be used (got {len(split.order)} images in {split.split}); check "
            f"source.path"
        )
    codec = source.event.codec(split.codec)
    return Manifest(
        name=source.name,
        split=split.split,
        class_names=source.class_names,
        codec=f"jpeg, quality {split.quality}" if codec == "jpeg" else codec,
        source=source.description,
        recipe=recipe,
        shards=records,
        reading=source.reading,
        dropped_copies=None if split.dropped is None else len(split.dropped),
        **source.event.fields(),
    )
