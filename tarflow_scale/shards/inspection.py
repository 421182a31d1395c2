"""Inspect a packed data set: check that it is undamaged, and describe its content."""

from collections import Counter

import numpy as np
from numpy.typing import NDArray

from tarflow_scale import storage
from tarflow_scale.errors import DataError
from tarflow_scale.runtime import console
from tarflow_scale.shards import duplicates
from tarflow_scale.shards.events import ImageEvent
from tarflow_scale.shards.images import contact_sheet
from tarflow_scale.shards.manifest import AS_FOUND, MANIFEST_NAME
from tarflow_scale.shards.reader import CorruptSample, ShardSet
from tarflow_scale.shards.sources.splits import PACKED

__all__ = ["check", "statistics"]

_RUN = 256
_SHEET_IMAGES = 64
_SHEET_COLUMNS = 8
_LISTED_CLASSES = 12


def check(path: str) -> int:
    """Verify all digests, counts, checksums, images, labels and keys of a data set; returns the number of samples.

    Raises:
        DataError: the data set has faults; the message has their number and the first fault.
    """
    shards = ShardSet(path)
    as_found = shards.manifest.codec == AS_FOUND  # keys of such tars may repeat from tar to tar
    faults: list[str] = []
    keys: Counter[str] = Counter()
    with console.ProgressBar(shards.manifest.num_images, "check") as bar:
        for number, record in enumerate(shards.manifest.shards):
            try:
                shards.verify_shard(record)
            except DataError as error:
                faults.append(str(error))
            for low in range(0, record.samples, _RUN):
                try:
                    run = shards.read_run(number, low, min(low + _RUN, record.samples))
                except DataError as error:  # its index is damaged, which verify_shard has reported
                    faults += [] if faults and record.file.removesuffix(".tar") in faults[-1] else [str(error)]
                    break
                for stored in run:
                    keys[f"{record.file}:{stored.key}" if as_found else stored.key] += 1
                    try:
                        shards.decode(stored)
                    except CorruptSample as error:
                        faults.append(str(error))
                bar.update(len(run))
    double = [key for key, times in keys.items() if times > 1]
    if double:
        faults.append(
            f"keys of samples must be unique (got {double[0]} {keys[double[0]]} times); pack the data set again"
        )
    if faults:
        raise DataError(f"{path} has {len(faults)} faults, the first: {faults[0]}")
    return shards.manifest.num_images


def statistics(path: str) -> list[str]:
    """Lines of text that describe a data set: sizes, classes and near copies.

    Also writes a contact sheet of 64 images next to the manifest. The search for near copies includes the other splits
    that were packed together with this one, so it decodes all their images. For vectors and latents, the
    lines give the mean, standard deviation and range of each number or channel instead, and there is no contact sheet.

    Raises:
        DataError: the path is not a data set; or a label, a vector, or an image of the contact sheet is corrupt.
    """
    shards = ShardSet(path)
    manifest = shards.manifest
    stored_bytes = sum(shard.bytes for shard in manifest.shards)
    labels = Counter[int]()
    with console.ProgressBar(manifest.num_images, "labels", enabled=manifest.num_classes > 0) as bar:
        for stored in shards.stored() if manifest.num_classes else ():
            labels[shards.label(stored)] += 1
            bar.update(1)
    rows = [
        ("data set", f"{manifest.name}/{manifest.split}"),
        ("samples", f"{manifest.num_images:,} {manifest.event}, {manifest.codec}"),
        ("shards", f"{len(manifest.shards):,}, with at most {max(s.samples for s in manifest.shards):,} samples each"),
        ("bytes", f"{stored_bytes:,}, {stored_bytes / manifest.num_images:,.0f} per sample"),
        ("source", manifest.source),
        ("classes", _class_row(labels, manifest.class_names)),
    ]
    if not isinstance(manifest.event, ImageEvent):
        return [console.table([*rows, *_columns(shards)], ("", path))]
    chosen = np.unique(np.linspace(0, manifest.num_images - 1, _SHEET_IMAGES).astype(np.int64))
    sheet = storage.join(path, "contact-sheet.png")
    storage.write_bytes(sheet, contact_sheet(shards.take(chosen).events, _SHEET_COLUMNS))
    return [console.table(rows, ("", path)), *_copies(_with_siblings(path, shards)), f"contact sheet: {sheet}"]


def _with_siblings(path: str, shards: ShardSet) -> list[ShardSet]:
    """This split and the splits that were packed together with it, in the order of `PACKED`."""
    folder, _, own = path.rstrip("/").rpartition("/")
    splits = {own: shards}
    for name in storage.list_names(folder or ".") if own == shards.manifest.split else ():
        other = storage.join(folder or ".", name)
        if name != own and storage.exists(storage.join(other, MANIFEST_NAME)):
            sibling = ShardSet(other)
            if (sibling.manifest.recipe, sibling.manifest.split) == (shards.manifest.recipe, name):
                splits[name] = sibling
    return [splits[name] for name in sorted(splits, key=(*PACKED, *splits).index)]


def _copies(splits: list[ShardSet]) -> list[str]:
    """Lines of text about near copies within and across splits."""
    fingerprints: list[bytes] = []
    origins: list[str] = []
    firsts = np.cumsum([0, *(shards.manifest.num_images for shards in splits)])
    with console.ProgressBar(int(firsts[-1]), "look for copies") as bar:
        for shards in splits:
            for stored in shards.stored():
                try:
                    fingerprints.append(duplicates.fingerprint(shards.decode(stored)[0]))
                    origins.append(shards.origin_of(stored))
                except CorruptSample:  # which --check lists
                    fingerprints.append(duplicates.NO_FINGERPRINT)
                    origins.append("")
                bar.update(1)

    def image(number: int) -> NDArray[np.uint8]:
        place = int(np.searchsorted(firsts, number, side="right")) - 1
        return splits[place].decode(splits[place].read(np.array([number - firsts[place]]))[0])[0]

    copies = duplicates.find_copies(duplicates.read_fingerprints([duplicates.text_of(fingerprints)]), image)
    split = np.repeat(np.arange(len(splits)), np.diff(firsts))
    names = [shards.manifest.split for shards in splits]
    short_side = min(splits[0].manifest.event.carried_shape[1:])
    return duplicates.described(copies, split, names, origins.__getitem__, short_side)


def _columns(shards: ShardSet) -> list[tuple[str, str]]:
    """Mean, standard deviation and range of each value and condition value of vectors, or each channel of latents."""
    batches = list(shards.batches(0, shards.manifest.num_images, _RUN))
    numbers = {
        "value" if shards.manifest.latents is None else "channel": [
            np.moveaxis(batch.events, 1, -1).reshape(-1, batch.events.shape[1]) for batch in batches
        ],
        "condition": [batch.conditions for batch in batches if batch.conditions is not None],
    }
    return [
        (
            f"{name} {i}",
            f"mean {column.mean():.4g}, std {column.std():.4g}, from {column.min():.4g} to {column.max():.4g}",
        )
        for name, parts in numbers.items()
        if parts
        for i, column in enumerate(np.concatenate(parts).astype(np.float64).T)
    ]


def _class_row(labels: Counter[int], names: tuple[str, ...]) -> str:
    if not names:
        return "none"
    counts = [labels[label] for label in range(len(names))]
    if len(names) <= _LISTED_CLASSES:
        return ", ".join(f"{label} {name} ({counts[label]:,})" for label, name in enumerate(names))
    few, many = int(np.argmin(counts)), int(np.argmax(counts))
    if counts[few] == counts[many]:
        return f"{len(names):,}, with {counts[few]:,} samples each"
    return f"{len(names):,}, with {counts[few]:,} ({names[few]}) to {counts[many]:,} ({names[many]}) samples each"
