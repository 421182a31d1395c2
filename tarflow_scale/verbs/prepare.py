"""Verb ``prepare``: images to WebDataset shards.

Open the source, split it (as it says, or by class), pack each split in a random order into tars with an index beside
each, and publish the manifests last, when all splits are packed. The same source and configuration give the same
bytes, with any number of workers. A packing that was killed goes on when it is run again; bad input leaves nothing.

Reads ``source.path`` (a folder, file or URL; nothing for ``digits``). Writes ``<shards.path>/train`` and ``/test``:
tars, ``*.index.npz``, ``manifest.json``, and ``skipped.jsonl`` or ``dropped.jsonl`` if images were left out. It refuses
sources that do not fit together, folders that hold other files or another data set, and a folder to which another
packing writes. Looking at a packed set: ``--check``, ``--stats``, ``--npz``.
"""

import functools
from collections.abc import Iterable, Mapping
from contextlib import nullcontext

import numpy as np
from numpy.typing import NDArray

from tarflow_scale import storage
from tarflow_scale.config.base import Section
from tarflow_scale.config.prepare import PrepareConfig, SplitConfig
from tarflow_scale.errors import DataError
from tarflow_scale.randomness import Purpose, permutation
from tarflow_scale.records import canonical_json
from tarflow_scale.runtime import console
from tarflow_scale.runtime.processes import exclusive
from tarflow_scale.shards import copies, inspection, packing
from tarflow_scale.shards.duplicates import Copy
from tarflow_scale.shards.images import Reading
from tarflow_scale.shards.manifest import AS_FOUND, MANIFEST_NAME, Manifest, index_name, read_manifest
from tarflow_scale.shards.npz import write_npz
from tarflow_scale.shards.sources import BadImage, ImageSource, open_source
from tarflow_scale.shards.sources.classes import class_warnings
from tarflow_scale.shards.sources.splits import PACKED, train_then_test
from tarflow_scale.shards.vectors import VALUES
from tarflow_scale.shards.writer import publish_manifest

__all__ = ["check", "export", "run", "statistics"]

_LATER_OF_SOURCE = ("label_column", "label_table", "label_names", "image_member", "condition_columns")
_LATER_OF_SPLIT = ("by_name", "train", "validation", "test", "ignore")
"""Settings that came later: at their defaults they do not count, so that data sets of earlier versions are known."""
_CLASSES_SHOWN = 12
"""Classes that the plan lists in full; of more, it shows the first five and the last two."""


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
    source = open_source(config.source, config.split, config.shards.num_workers)
    recipe = _Recipe(source, config)
    splits = _split(source, config.split)
    _print_plan(source, splits, config)
    path = config.shards.path
    missing = _missing(config, splits, recipe)  # and refuse what is not ours before anything is touched
    if dry_run:
        return
    if not missing:
        print(f"{path}: nothing to do, this data set is packed")
        return
    with nullcontext() if storage.is_remote(path) else exclusive(storage.local(path)):
        missing = _missing(config, splits, recipe)
        dropped = None
        if config.split.near_duplicates == "drop":
            skip_bad, num_workers = config.source.bad_images == "skip", config.shards.num_workers
            splits, dropped = copies.without_copies(source, splits, skip_bad, num_workers)
        _pack(source, {split: splits[split] for split in missing}, recipe.digest, config, dropped)


class _Recipe:
    """Which data set a source and a configuration make.

    Args:
        source: the source.
        config: the configuration; paths and numbers of workers do not count.
    """

    def __init__(self, source: ImageSource, config: PrepareConfig) -> None:
        self._source = source
        of_files = {"orientation", "transparency"}
        self._earlier = _digest(config, source, of_files)
        self.digest = self._earlier if source.reading is None else _digest(config, source, set())

    def made(self, path: str) -> bool:
        """Whether the data set at ``path`` is the one; if it is of a version without `Reading`, by looking at images.

        Raises:
            DataError: it is of such a version, and one of its images would have other pixels now.
        """
        found = read_manifest(path)
        if found.reading is not None or found.recipe != self._earlier:
            return found.recipe == self.digest
        other = self._read_otherwise
        if other is not None:
            raise DataError(
                f"{path} was packed by an earlier version, which ignored orientation tags, transparency and all frames "
                f"but the first (got {other}, which is read otherwise now); keep it, or pack to another shards.path"
            )
        return True

    @functools.cached_property
    def _read_otherwise(self) -> str | None:
        """The first image whose pixels depend on its `Reading`; None without any."""
        source = self._source
        numbers = range(len(source)) if source.reading is not None else ()
        with console.progress_bar(len(numbers), "look at tags") as bar:
            for number in numbers:
                if not source.reads_alike(number):
                    return source.origin(number)
                bar.update(1)
        return None


def _at_default(section: Section, names: Iterable[str]) -> set[str]:
    return {name for name in names if getattr(section, name) == type(section).model_fields[name].default}


def _digest(config: PrepareConfig, source: ImageSource, left_out: set[str]) -> str:
    """Of all settings that make the data set, but some of the source, and of what the source holds."""
    of_source, of_split = _at_default(config.source, _LATER_OF_SOURCE), _at_default(config.split, _LATER_OF_SPLIT)
    if source.vectors is not None:
        of_source -= {"label_column", "condition_columns"}
    if config.split.near_duplicates != "drop":
        of_split.add("near_duplicates")
    settings = config.model_dump(
        mode="json",
        exclude={
            "shards": {"path", "num_workers"},
            "source": {"path"} | left_out | of_source,
            "split": of_split,
        },
    )
    return storage.digest(canonical_json([settings, source.digest]))


def _pack(
    source: ImageSource,
    splits: dict[str, NDArray[np.int64]],
    recipe: str,
    config: PrepareConfig,
    dropped: list[Copy] | None,
) -> None:
    for split in splits:
        packing.claim(_path(config, split))
    try:
        plans = {split: _plan(source, members, split, recipe, config) for split, members in splits.items()}
        notes = {split: packing.pack(plan, config.shards.num_workers) for split, plan in plans.items()}
        _check_skipped(notes, config)
        of = {split: dropped if split == "train" or dropped is None else [] for split in splits}
        manifests = {split: _manifest(plans[split], notes[split], recipe, of[split]) for split in splits}
    except DataError:
        for split in splits:
            packing.clear(_path(config, split))
        raise
    for split, manifest in manifests.items():
        path = _path(config, split)
        packing.list_skipped(plans[split], notes[split])
        packing.list_dropped(plans[split], of[split] or [])
        publish_manifest(path, manifest)
        packing.remove_notes(plans[split])
        skipped = sum(len(note.skipped) for note in notes[split])
        left_out = f", {skipped} unusable images left out ({path}/skipped.jsonl)" if skipped else ""
        what = "vectors" if manifest.vectors else "images"
        shards = f"{len(manifest.shards)} shard{'s' * (len(manifest.shards) > 1)}"
        print(f"{path}: {manifest.num_images} {what} in {shards}, manifest {manifest.digest[:12]}{left_out}")
    if all(plan.fingerprints for plan in plans.values()):
        copies.report(source, plans, notes)


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
    print("\n".join([found.table, *found.copies]))
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
    if config.kind == "official" and source.official is None:
        raise DataError(f"{source.name} has no official split (got split.kind=official); use stratified")
    if config.kind == "stratified" or source.official is None:
        codes = train_then_test(0, len(source))
        codes[~_stratified(source.labels, config.test_fraction, config.seed)] = PACKED.index("train")
    else:
        codes = source.official
    splits = {name: np.flatnonzero(codes == code) for code, name in enumerate(PACKED)}
    if not len(splits["train"]):
        raise DataError(
            f"no image is left for training (got {len(codes)} and split.test_fraction={config.test_fraction:g}); "
            f"lower it"
        )
    return {name: members for name, members in splits.items() if len(members)}


def _stratified(labels: NDArray[np.int64], test_fraction: float, seed: int) -> NDArray[np.bool_]:
    """Which images are for testing; each class gives the same share.

    One sort groups the images by class: 14.2 M images of 21,841 classes take 11 s on one core.
    """
    by_class = np.argsort(labels, kind="stable")
    classes, firsts = np.unique(labels[by_class], return_index=True)
    in_test = np.zeros(len(labels), dtype=np.bool_)
    for label, members in zip(classes.tolist(), np.split(by_class, firsts[1:]), strict=True):
        chosen = permutation(len(members), Purpose.SPLIT, seed, label)[: round(len(members) * test_fraction)]
        in_test[members[chosen]] = True
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
    for line in source.lines:
        print(line)
    _print_ignored(source.ignored)
    if source.class_names:
        print(f"classes: {_classes(source)}")
    official = source.official if config.split.kind != "stratified" else None
    for line in class_warnings(source.class_names, source.labels, official, PACKED):
        print(line)
    share = f"split.test_fraction={config.split.test_fraction:g}"
    if len(splits) == 1 and official is None and config.split.test_fraction:
        print(f"warning: no test split: {share} of a class is less than one image")
    elif official is None and config.split.test_fraction:
        of = "each class" if source.class_names else "the images"
        print(f"{config.split.test_fraction * 100:g}% of {of} is held out at random: {share}")
    print(console.table(rows, ("split", "samples", "shards", "a sample")))


def _print_ignored(ignored: Mapping[str, int]) -> None:
    if ignored:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(ignored.items()))
        print(f"not images that are read, and passed over: {kinds}")


def _classes(source: ImageSource) -> str:
    """``cat 120, dog 80``: the first and last classes with their numbers of images."""
    counts = np.bincount(source.labels, minlength=len(source.class_names))
    shown = [f"{name} {count:,}" for name, count in zip(source.class_names, counts.tolist(), strict=True)]
    return ", ".join(shown if len(shown) <= _CLASSES_SHOWN else [*shown[:5], "..", *shown[-2:]])


def _missing(config: PrepareConfig, splits: Iterable[str], recipe: _Recipe) -> list[str]:
    """Splits that are not packed."""
    return [split for split in splits if not _already_there(_path(config, split), recipe)]


def _already_there(path: str, recipe: _Recipe) -> bool:
    if not storage.exists(storage.join(path, MANIFEST_NAME)):
        packing.refuse_foreign(path)
        return False
    if not recipe.made(path):
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
        fingerprints=config.split.near_duplicates == "report" and source.vectors is None,
    )


def _manifest(
    plan: packing.Packing, notes: list[packing.PackNote], recipe: str, dropped: list[Copy] | None
) -> Manifest:
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
        reading=source.reading,
        dropped_copies=None if dropped is None else len(dropped),
    )


def _index_in_place(config: PrepareConfig, dry_run: bool) -> None:
    """Make foreign tars a data set where they lie: an index beside each, and the manifest last."""
    from tarflow_scale.shards.sources.tars import index_tars

    path = config.shards.path
    if storage.exists(storage.join(path, MANIFEST_NAME)):
        _check_same_tars(path)
        print(f"{path}: nothing to do, this is a data set")
        return
    reading = Reading(orientation=config.source.orientation, transparency=config.source.transparency)
    found = index_tars(config.source, reading, config.shards.num_workers)
    manifest = Manifest(
        name=storage.base_name(path),
        split="train",
        image_size_pixels=found.size_pixels,
        num_channels=found.num_channels,
        class_names=found.class_names,
        bit_depth=8,
        codec=AS_FOUND,
        source="WebDataset tars, indexed in place",
        recipe=storage.digest(b"".join(found.indexes)),
        shards=found.records,
        reading=reading,
    )
    print(f"{path}: {manifest.num_images} images {manifest.event_shape} in {len(manifest.shards)} tars")
    _print_ignored(found.ignored)
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
