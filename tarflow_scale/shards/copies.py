"""Near copies within and across the splits of a source: report them after packing, or drop them before packing."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from tarflow_scale.errors import DataError
from tarflow_scale.shards import duplicates, packing
from tarflow_scale.shards.events import ImageEvent
from tarflow_scale.shards.sources import ImageSource

__all__ = ["report", "without_copies"]


def without_copies(
    source: ImageSource, splits: Mapping[str, NDArray[np.int64]], skip_bad: bool, num_workers: int
) -> tuple[dict[str, NDArray[np.int64]], list[duplicates.Copy]]:
    """Drop copies and near copies from the first split (training); returns all splits and the dropped copies.

    Args:
        source: the source; all of its images are decoded.
        splits: for each split, by name, the numbers of its images.
        skip_bad: whether to skip unusable images; otherwise, they raise an error.
        num_workers: number of processes that compute fingerprints; it does not change the result.

    Raises:
        DataError: the samples are not images, an image is unusable, or no training image is left.
    """
    if not isinstance(source.event, ImageEvent):
        raise DataError(f"split.near_duplicates=drop works only for images (got {source.event.noun}); remove it")
    fingerprints = packing.read_fingerprints(source, skip_bad, num_workers)
    copies = duplicates.find_copies(fingerprints, source.image)
    split = _split_of(source, splits)
    dropped = duplicates.superfluous(copies, split)
    split[[copy.image for copy in dropped]] = -1
    kept = {name: members[split[members] >= 0] for name, members in splits.items()}
    first = next(iter(splits))
    if not len(kept[first]):
        raise DataError(
            f"split.near_duplicates=drop must leave a training image (got {len(dropped):,} images, and all are copies "
            f"or near copies of held-out images); set split.near_duplicates=report to keep them"
        )
    print(f"{first}: {len(dropped):,} of {len(splits[first]):,} images are dropped as copies or near copies")
    _print(source, copies, split, list(splits))
    return kept, dropped


def report(packings: Sequence[packing.Packing], notes: Sequence[Sequence[packing.PackNote]]) -> None:
    """Print which images of packed splits are copies or near copies of others.

    Args:
        packings: one packing per split, all from the same source.
        notes: the notes of each packing, in the same order; they must contain fingerprints.
    """
    source = packings[0].source
    fingerprints = np.zeros((len(source), 2), dtype=np.uint64)
    for packed, its_notes in zip(packings, notes, strict=True):
        fingerprints[packed.order] = duplicates.read_fingerprints([note.fingerprints for note in its_notes])
    split = _split_of(source, {packed.split: packed.order for packed in packings})
    _print(source, duplicates.find_copies(fingerprints, source.image), split, [packed.split for packed in packings])


def _split_of(source: ImageSource, splits: Mapping[str, NDArray[np.int64]]) -> NDArray[np.int64]:
    """Split number of every image; -1 for images in no split."""
    split = np.full(len(source), -1, dtype=np.int64)
    for number, members in enumerate(splits.values()):
        split[members] = number
    return split


def _print(source: ImageSource, copies: duplicates.Copies, split: NDArray[np.int64], names: list[str]) -> None:
    print("\n".join(duplicates.described(copies, split, names, source.origin, min(source.shape[1:]))))
