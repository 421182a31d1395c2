"""The overview that ``prepare`` prints before it packs: splits, classes, warnings, and number of shards."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from tarflow_scale.config.prepare import PackedShardsConfig, SplitConfig
from tarflow_scale.runtime import console
from tarflow_scale.shards.sources import ImageSource
from tarflow_scale.shards.sources.classes import class_warnings
from tarflow_scale.shards.sources.splits import PACKED

__all__ = ["print_ignored", "print_preview"]

_CLASSES_SHOWN = 12
"""If there are more classes than this, only the first five and the last two are shown."""


def print_preview(
    source: ImageSource, splits: Mapping[str, NDArray[np.int64]], split: SplitConfig, shards: PackedShardsConfig
) -> None:
    """Print the splits, classes and shards of a source, and its warnings."""
    print(f"{source.name}: {len(source)} samples, {len(source.class_names)} classes -> {shards.path}")
    print("\n".join([source.description, *source.lines]))
    print_ignored(source.ignored)
    if source.class_names:
        print(f"classes: {_classes(source)}")
    official = source.official if split.kind != "stratified" else None
    for line in class_warnings(source.class_names, source.labels, official, PACKED):
        print(line)
    if official is None and split.test_fraction:
        share = f"split.test_fraction={split.test_fraction:g}"
        if len(splits) == 1:
            print(f"warning: no test split: {share} of each class is less than one image")
        else:
            of = "each class" if source.class_names else "the images"
            print(f"{split.test_fraction * 100:g}% of {of} is held out at random: {share}")
    rows = [
        (name, str(len(members)), str(-(-len(members) // shards.samples_per_shard)), str(source.event))
        for name, members in splits.items()
    ]
    print(console.table(rows, ("split", "samples", "shards", "kind of sample")))


def print_ignored(ignored: Mapping[str, int]) -> None:
    """Print how many files of the source are not read, by kind."""
    if ignored:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(ignored.items()))
        print(f"files that are not packed: {kinds}")


def _classes(source: ImageSource) -> str:
    """The first and last classes with their numbers of images, for example ``cat 120, dog 80``."""
    counts = np.bincount(source.labels, minlength=len(source.class_names))
    shown = [f"{name} {count:,}" for name, count in zip(source.class_names, counts.tolist(), strict=True)]
    return ", ".join(shown if len(shown) <= _CLASSES_SHOWN else [*shown[:5], "..", *shown[-2:]])
