"""Choose which splits of a source are packed, and under which names.

The training split is packed, and so is every held-out split that a pattern names. If no pattern names one, the test
split is packed; if there is no test split, the validation split is packed under the name ``test``. A split without
labels is left out if the training split has labels. All splits that are left out are reported.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tarflow_scale.config.prepare import SplitConfig
from tarflow_scale.errors import DataError
from tarflow_scale.shards.sources.splits import PACKED, Role, counted

__all__ = ["Group", "Settled", "SourceFile", "settle", "settle_files"]


@dataclass
class Group:
    """The images of one split of a source.

    Args:
        names: folders, tables or tars of the split.
        num_images: number of its images.
        num_labelled: number of its images that have labels; must be 0 or ``num_images``.
    """

    names: list[str] = field(default_factory=list)
    num_images: int = 0
    num_labelled: int = 0

    @property
    def words(self) -> str:
        """The names as text: ``train-0.parquet`` or ``train-0.parquet and 3 more``."""
        more = len(self.names) - 1
        return f"{self.names[0]} and {more} more" if more else self.names[0]


class SourceFile(NamedTuple):
    """A table or tar. All of its images belong to one split.

    Args:
        name: path below the source.
        role: the split; None in a source without splits.
        num_images: number of images in the file.
        num_labelled: number of these images that have labels.
        unlabelled: the first image without a label, for messages; empty if all images have labels.
    """

    name: str
    role: Role | None
    num_images: int
    num_labelled: int
    unlabelled: str


@dataclass(frozen=True)
class Settled:
    """Which splits of a source are packed.

    Args:
        packed: for each split of the source that is packed, the name under which it is packed.
        official: whether a training and a held-out split are packed; if not, all images are pooled and divided.
        lines: lines that explain the choice, to be printed.
        words: description of the split for the manifest; empty if the source has no splits.
    """

    packed: dict[Role, str]
    official: bool
    lines: tuple[str, ...]
    words: str

    def keeps(self, role: Role | None) -> bool:
        """Whether the images of a split are packed; true for None, which means a source without splits."""
        return role is None or role in self.packed

    def codes(self, roles: Sequence[Role | None]) -> NDArray[np.int8] | None:
        """The split of every image, as an index into `PACKED`; None if there is no official split.

        Args:
            roles: split of each image; each must be a packed split.
        """
        if not self.official:
            return None
        return np.array([PACKED.index(self.packed[role or ""]) for role in roles], dtype=np.int8)


def settle_files(files: Sequence[SourceFile], split: SplitConfig) -> Settled:
    """Choose which splits of tables or tars are packed.

    Raises:
        DataError: some images of a split have labels and some have none; see also `settle`.
    """
    groups: dict[Role | None, Group] = {}
    for file in files:
        if file.num_images:
            group = groups.setdefault(file.role, Group())
            group.names.append(file.name)
            group.num_images += file.num_images
            group.num_labelled += file.num_labelled
    for role, group in groups.items():
        if 0 < group.num_labelled < group.num_images:
            first = next(file.unlabelled for file in files if file.role == role and file.unlabelled)
            raise DataError(
                f"either all samples or none must have a label (got no label for {first}); label or remove it, or "
                f"exclude its file with split.ignore"
            )
    return settle({role: group for role, group in groups.items() if role is not None}, split)


def settle(groups: dict[Role, Group], split: SplitConfig) -> Settled:
    """Choose which splits are packed.

    Raises:
        DataError: a source with several splits has none for training; a pattern names a split without images; a pattern
            names a split with labels, but the training split has none, or vice versa; or only held-out images have
            labels.
    """
    held_out: tuple[Role, ...] = ("test", "validation")
    wanted = [role for role in held_out if split.patterns[role]]
    if not groups:
        return Settled({}, official=False, lines=(), words="")
    missing = next((role for role in wanted if role not in groups), None)
    if missing is not None:
        raise DataError(
            f"split.{missing} must match images (got none, because split.ignore matches the same files, or the files "
            f"have no images); correct the patterns"
        )
    if len(groups) == 1:
        role, group = next(iter(groups.items()))
        line = f"{group.words}: the only split ({role}); it is divided like a source without splits"
        return Settled({role: "train"}, official=False, lines=(line,), words=f"{role} split alone")
    if "train" not in groups:
        raise DataError(
            f"a source with splits must have a training split (got {_listed(groups)}); assign it with split.train"
        )
    train = groups["train"]
    labelled = train.num_labelled > 0
    fits = {role: group for role, group in groups.items() if (group.num_labelled > 0) == labelled and role != "other"}
    if split.kind == "stratified":
        lines = [f"split.kind=stratified: {_listed(fits)} are pooled and divided again"]
        lines += [_left_out(role, group, labelled=True) for role, group in groups.items() if role not in fits]
        return Settled(
            dict.fromkeys(fits, "train"), official=False, lines=tuple(lines), words=f"pooled ({', '.join(fits)})"
        )
    wrong = next((role for role in wanted if role not in fits), None)
    if wrong is not None:
        have, want = ("no labels", "labels") if labelled else ("labels", "no labels")
        raise DataError(
            f"the images of split.{wrong} must have labels if and only if the training images do (got {have} in "
            f"{groups[wrong].words}, {want} in {train.words}); remove split.{wrong}, or pack its images as a separate "
            f"source"
        )
    chosen: dict[Role, str] = {role: role for role in wanted}
    if not chosen:
        chosen = {role: "test" for role in held_out if role in fits}
        chosen = dict(list(chosen.items())[:1])
    unfit = next((role for role in held_out if role in groups), None)
    if not labelled and not chosen and unfit is not None:
        raise DataError(
            f"training images must have labels if held-out images have labels (got no labels in {train.words}, "
            f"labels in {groups[unfit].words}); add labels, or exclude the held-out images with split.ignore"
        )
    packed: dict[Role, str] = {"train": "train", **chosen}
    lines = [
        f"{groups[role].words}: packed as {name} ({role} split, {_images(groups[role])})"
        for role, name in packed.items()
    ]
    lines += [_left_out(role, group, labelled) for role, group in groups.items() if role not in packed]
    if not chosen:
        lines.append("no held-out split with labels: a share (split.test_fraction) of each class is held out of train")
        return Settled(packed, official=False, lines=tuple(lines), words="training split alone")
    words = ", ".join(role if name == role else f"{role} as {name}" for role, name in packed.items())
    left_out = [f"{role} left out" for role in groups if role not in packed]
    words = f"official split ({'; '.join(filter(None, (words, ', '.join(left_out))))})"
    return Settled(packed, official=True, lines=tuple(lines), words=words)


def _left_out(role: Role, group: Group, labelled: bool) -> str:
    if labelled and not group.num_labelled:
        why = "which has no labels; pack it as a separate source to use it"
    elif role in PACKED:
        why = f"which is not chosen; name it with split.{role} to pack it"
    else:
        why = "which is neither a training nor a held-out split; name it with split.train or split.test to pack it"
    return f"left out: {group.words} ({role} split, {_images(group)}), {why}"


def _images(group: Group) -> str:
    return counted(group.num_images, "image")


def _listed(groups: dict[Role, Group]) -> str:
    return ", ".join(f"{role} in {group.words}" for role, group in groups.items())
