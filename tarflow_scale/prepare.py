"""Verb ``prepare``: images to WebDataset shards.

Open the source, split it (as it says, or by class), pack each split in a random order into tars with an index beside
each, and publish the manifests last, when all splits are packed. The same source and configuration give the same
bytes, with any number of workers. A packing that was killed goes on when it is run again; bad input leaves nothing.

Reads ``source.path`` (a folder, file or URL; nothing for ``digits``). Writes ``<shards.path>/train`` and ``/test``:
tars, ``*.index.npz``, ``manifest.json``, and ``skipped.jsonl`` if images were left out. Refused are sources that do not
fit together, folders that hold other files or another data set, and a folder to which another packing writes. Looking
at a packed set: ``--check``, ``--stats``, ``--npz``.
"""

from collections.abc import Iterable
from contextlib import nullcontext

import numpy as np
from numpy.typing import NDArray

from tarflow_scale import storage, telemetry
from tarflow_scale.config import PrepareConfig, SplitConfig
from tarflow_scale.errors import DataError
from tarflow_scale.processes import exclusive
from tarflow_scale.randomness import Purpose, permutation
from tarflow_scale.records import canonical_json
from tarflow_scale.shards import inspection, packing
from tarflow_scale.shards.manifest import AS_FOUND, MANIFEST_NAME, Manifest, index_name, read_manifest
from tarflow_scale.shards.npz import write_npz
from tarflow_scale.shards.sources import BadImage, ImageSource, open_source
from tarflow_scale.shards.sources.tars import index_tars
from tarflow_scale.shards.vectors import VALUES
from tarflow_scale.shards.writer import publish_manifest

__all__ = ["check", "export", "run", "statistics"]


def run(config: PrepareConfig, dry_run: bool) -> None:
    """Pack the splits of the source, unless they are packed already.

    Raises:
        DataError: the source is unsuitable, or the target holds another data set, or files of somebody else.
        StorageError: another ``prepare`` writes to the target.
    """
    try:
        _prepare(config, dry_run)
    except BadImage as error:
        if config.source.bad_images == "skip":
            raise
        raise BadImage(f"{error}, or leave out all that cannot be used, with source.bad_images=skip") from error


def _prepare(config: PrepareConfig, dry_run: bool) -> None:
    if config.source.in_place:
        _index_in_place(config, dry_run)
        return
    source = open_source(config.source)
    of_vectors = set[str]() if source.vectors else {"label_column", "condition_columns"}
    settings = config.model_dump(
        mode="json", exclude={"shards": {"path", "num_workers"}, "source": {"path"} | of_vectors}
    )
    recipe = storage.digest(canonical_json([settings, source.digest]))
    splits = _split(source, config.split)
    _print_plan(source, splits, config)
    if dry_run:
        return
    path = config.shards.path
    if not _missing(config, splits, recipe):  # and refuse what is not ours before anything is touched
        print(f"{path}: nothing to do, this data set is packed")
        return
    with nullcontext() if storage.is_remote(path) else exclusive(storage.local(path)):
        _pack(source, {split: splits[split] for split in _missing(config, splits, recipe)}, recipe, config)


def _pack(source: ImageSource, splits: dict[str, NDArray[np.int64]], recipe: str, config: PrepareConfig) -> None:
    for split in splits:
        packing.claim(_path(config, split))
    try:
        plans = {split: _plan(source, members, split, recipe, config) for split, members in splits.items()}
        notes = {split: packing.pack(plan, config.shards.num_workers) for split, plan in plans.items()}
        _check_skipped(notes, config)
        manifests = {split: _manifest(plans[split], notes[split], recipe) for split in splits}
    except DataError:
        for split in splits:
            packing.clear(_path(config, split))
        raise
    for split, manifest in manifests.items():
        path = _path(config, split)
        packing.list_skipped(plans[split], notes[split])
        publish_manifest(path, manifest)
        packing.remove_notes(plans[split])
        skipped = sum(len(note.skipped) for note in notes[split])
        left_out = f", {skipped} unusable images left out ({path}/skipped.jsonl)" if skipped else ""
        what = "vectors" if manifest.vectors else "images"
        shards = f"{len(manifest.shards)} shard{'s' * (len(manifest.shards) > 1)}"
        print(f"{path}: {manifest.num_images} {what} in {shards}, manifest {manifest.digest[:12]}{left_out}")


def _check_skipped(notes: dict[str, list[packing.PackNote]], config: PrepareConfig) -> None:
    """A few images may be unusable; if many are, the configuration does not suit them."""
    skipped = [one for several in notes.values() for note in several for one in note.skipped]
    packed = sum(note.record.samples for several in notes.values() for note in several if note.record is not None)
    limit = config.source.max_bad_fraction
    if len(skipped) > limit * (len(skipped) + packed):
        raise DataError(
            f"{len(skipped)} of {len(skipped) + packed} images cannot be used (allowed: source.max_bad_fraction="
            f"{limit:g}), for one: {skipped[0].reason}"
        )


def check(path: str) -> None:
    """``--check``: verify every byte of a packed data set."""
    print(f"{path}: all {inspection.check(path)} samples are what was packed")


def statistics(path: str) -> None:
    """``--stats``: what is in a packed data set."""
    found = inspection.statistics(path)
    print(found.table)
    if found.sheet is not None:
        print(f"contact sheet: {found.sheet}")


def export(path: str, location: str) -> None:
    """``--npz``: a packed data set as the file that ADM's evaluator takes."""
    if read_manifest(path).vectors is not None:
        raise DataError(f"--npz is for images (got {read_manifest(path).samples_in_words} in {path}); read the tars")
    print(f"{location}: {write_npz(path, location)} images of {path}")


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
    if not len(splits["train"]):
        raise DataError(
            f"no image is left for training (got {len(in_test)} and split.test_fraction={config.test_fraction:g}); "
            f"lower it"
        )
    return {name: members for name, members in splits.items() if len(members)}


def _stratified(labels: NDArray[np.int64], test_fraction: float, seed: int) -> NDArray[np.bool_]:
    """Which images are for testing; each class gives the same share."""
    test: list[NDArray[np.int64]] = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        chosen = permutation(len(members), Purpose.SPLIT, seed, int(label))[: round(len(members) * test_fraction)]
        test.append(members[chosen])
    in_test = np.zeros(len(labels), dtype=np.bool_)
    in_test[np.concatenate(test)] = True
    return in_test


def _print_plan(source: ImageSource, splits: dict[str, NDArray[np.int64]], config: PrepareConfig) -> None:
    shape, facts = source.shape, source.vectors
    size = f"{'x'.join(map(str, shape))}, {source.bit_depth} bit" if facts is None else f"{facts.num_values} values"
    rows = [
        (name, str(len(members)), str(-(-len(members) // config.shards.samples_per_shard)), size)
        for name, members in splits.items()
    ]
    print(f"{source.name}: {len(source)} samples, {len(source.class_names)} classes -> {config.shards.path}")
    print(source.description)
    if source.ignored:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(source.ignored.items()))
        print(f"not images that are read, and passed over: {kinds}")
    print(telemetry.table(rows, ("split", "samples", "shards", "a sample")))


def _missing(config: PrepareConfig, splits: Iterable[str], recipe: str) -> list[str]:
    """Splits that are not packed."""
    return [split for split in splits if not _already_there(_path(config, split), recipe)]


def _already_there(path: str, recipe: str) -> bool:
    if not storage.exists(storage.join(path, MANIFEST_NAME)):
        packing.refuse_foreign(path)
        return False
    if read_manifest(path).recipe != recipe:
        raise DataError(f"{path} holds another data set; choose another shards.path or delete it")
    return True


def _plan(
    source: ImageSource, members: NDArray[np.int64], split: str, recipe: str, config: PrepareConfig
) -> packing.Packing:
    order = members[permutation(len(members), Purpose.PACK_ORDER, config.split.seed)]
    return packing.Packing(
        source=source,
        path=_path(config, split),
        split=split,
        order=order,
        samples_per_shard=config.shards.samples_per_shard,
        codec=config.shards.codec,
        quality=config.shards.jpeg_quality,
        skip_bad=config.source.bad_images == "skip",
        plan=storage.digest(f"{recipe} {source.version} {split}".encode() + order.tobytes()),
    )


def _manifest(plan: packing.Packing, notes: list[packing.PackNote], recipe: str) -> Manifest:
    source = plan.source
    records = tuple(note.record for note in notes if note.record is not None)
    if not records:
        raise DataError(
            f"no image of {source.name} could be used (of {len(plan.order)} in {plan.split}); see the source"
        )
    channels, height, _ = source.shape if source.vectors is None else (source.vectors.num_values, 1, 1)
    codec = VALUES if source.vectors else plan.codec
    return Manifest(
        name=source.name,
        split=plan.split,
        image_size_pixels=height,
        num_channels=channels,
        class_names=source.class_names,
        bit_depth=source.bit_depth,
        codec=f"jpeg, quality {plan.quality}" if codec == "jpeg" else codec,
        source=source.description,
        recipe=recipe,
        shards=records,
        vectors=source.vectors,
    )


def _index_in_place(config: PrepareConfig, dry_run: bool) -> None:
    """Make foreign tars a data set where they lie: an index beside each, and the manifest last."""
    path = config.shards.path
    if storage.exists(storage.join(path, MANIFEST_NAME)):
        _check_same_tars(path)
        print(f"{path}: nothing to do, this is a data set")
        return
    found = index_tars(path)
    manifest = Manifest(
        name=storage.base_name(path),
        split="train",
        image_size_pixels=found.size_pixels,
        num_channels=found.num_channels,
        class_names=tuple(str(label) for label in range(int(found.labels.max()) + 1)) if found.labelled else (),
        bit_depth=8,
        codec=AS_FOUND,
        source="WebDataset tars, indexed in place",
        recipe=storage.digest(b"".join(found.indexes)),
        shards=found.records,
    )
    print(f"{path}: {manifest.num_images} images {manifest.event_shape} in {len(manifest.shards)} tars")
    if dry_run:
        return
    for record, index in zip(found.records, found.indexes, strict=True):
        storage.write_bytes(storage.join(path, index_name(record.file)), index)
    publish_manifest(path, manifest)
    print(f"{path}: indexed in place, {manifest.num_classes} classes, manifest {manifest.digest[:12]}")


def _check_same_tars(path: str) -> None:
    known = {shard.file: shard.bytes for shard in read_manifest(path).shards}
    found = {name: size for name, size in storage.list_sizes(path).items() if name.endswith(".tar")}
    changed = sorted(name for name in known.keys() | found if known.get(name) != found.get(name))
    if changed:
        raise DataError(
            f"{path} has other tars than its manifest names (got {changed[0]} new, gone or changed); delete "
            f"{MANIFEST_NAME} to index them again"
        )
