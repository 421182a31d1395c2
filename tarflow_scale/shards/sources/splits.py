"""Which part of a source is which split: one set of rules for folders, zips, tables and tars.

1. A pattern of the configuration decides: ``split.train``, ``split.validation``, ``split.test``, ``split.ignore``.
2. Without a pattern the name decides, unless ``split.by_name`` is false: ``train``, ``Training``, ``val2017``,
   ``seg_test``, ``imagenet-val-000003.tar``. `_WORDS` has the words and their meanings.
3. If no name means a split, the source has none, and ``split.test_fraction`` of each class is held out.
4. Names that mean a split beside names that do not are refused: the configuration must say which is which.
5. Beside ``train``, the splits that patterns name are packed; else the test split; else the validation split. A split
   without labels is left out if ``train`` has labels. Everything that is left out is reported.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tarflow_scale.config.prepare import SplitConfig
from tarflow_scale.errors import DataError

__all__ = [
    "PACKED",
    "SPLIT_COLUMNS",
    "Group",
    "Patterns",
    "Role",
    "Settled",
    "SourceFile",
    "counted",
    "looks_split",
    "named",
    "other_words",
    "paired",
    "refuse_split_column",
    "role_of",
    "roles_of_files",
    "settle",
    "settle_files",
    "train_then_test",
    "unread_lists",
]

Role = str
"""``train``, ``validation``, ``test``, or ``other`` for a split that is none of these."""
PACKED = ("train", "validation", "test")
"""Names of packed splits; an image's entry in `ImageSource.official` is an index of it."""

_WORDS: dict[str, Role] = {
    **dict.fromkeys(("train", "training", "trn", "trainval", "trainset", "traindata"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validate", "validating", "dev", "devel", "valset"), "validation"),
    **dict.fromkeys(("test", "testing", "tst", "eval", "evaluation", "holdout", "heldout", "testset"), "test"),
    **dict.fromkeys(("extra", "additional", "unlabeled", "unlabelled", "unsupervised", "pred", "predict"), "other"),
}
_STRONG = ("train", "training", "trainval", "val", "valid", "validation", "test", "testing")
"""Words that are hardly ever a class; the others mean a split only beside one of these."""
_LISTS = (".txt", ".csv", ".tsv", ".json", ".jsonl", ".lst", ".mat", ".npy")
_SPLITS = {"split", "splits", "partition", "partitions", "folds"}
"""Words of lists that hold several splits."""
_FLAGS = ("is_train", "is_valid", "is_val", "is_test")
SPLIT_COLUMNS = (*_FLAGS, "split", "set", "subset", "partition", "usage", "phase", "fold", "dataset")


def words_of(name: str) -> list[str]:
    """Words of a name in lower case: ``segTest_2`` has ``seg`` and ``test``."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]


def role_of(name: str, strong: bool = False) -> Role | None:
    """The split that a name means, or ``several``; ``strong`` counts only words that are hardly ever a class."""
    roles = {_WORDS[word] for word in words_of(name) if word in _WORDS and (not strong or word in _STRONG)}
    return None if not roles else roles.pop() if len(roles) == 1 else "several"


def other_words(name: str) -> tuple[str, ...]:
    """Words of a name that mean no split: ``seg`` and ``images`` of ``seg_train_images``."""
    return tuple(word for word in words_of(name) if word not in _WORDS)


def looks_split(name: str) -> bool:
    """Whether a name as a whole is a usual name of a split: ``Train``, ``val2017``."""
    words = words_of(name)
    return len(words) == 1 and words[0] in _STRONG


def paired(names: Sequence[str]) -> tuple[str, str] | None:
    """Two names that differ only in ``train`` and a word for held-out images, such as ``mytrain0`` and ``mytest0``."""
    by_lower = {name.lower(): name for name in names}
    for lower, name in by_lower.items():
        for word in ("test", "validation", "valid", "val", "dev", "eval"):
            other = by_lower.get(lower.replace("train", word))
            if "train" in lower and other is not None:
                return name, other
    return None


def unread_lists(files: Iterable[str]) -> list[str]:
    """A line about lists such as ``meta/train.txt`` and ``meta/test.txt``, which may define splits and are not read."""
    roles: dict[str, Role] = {}
    for file in files:
        stem = file.rpartition("/")[2].rpartition(".")[0]
        role = role_of(stem, strong=True) if _SPLITS.isdisjoint(words_of(stem)) else "several"
        if role is not None and file.lower().endswith(_LISTS):
            roles[file] = role
    if "several" not in roles.values() and not {"train"} < set(roles.values()):
        return []
    return [
        f"warning: files that may say the split are not read ({named(list(roles), 4)}); divide the images by them, or "
        f"name the splits with split.train and split.test"
    ]


def refuse_split_column(column: str, values: Iterable[object], table: str) -> None:
    """Refuse a column of a table that defines splits, by its name and values, because such columns are not read.

    Raises:
        DataError: it does.
    """
    if column.lower() not in SPLIT_COLUMNS:
        return
    different = set(values)
    roles = {role_of(value) for value in different if isinstance(value, str)}
    if ("train" in roles and roles & {"test", "validation"}) or (column.lower() in _FLAGS and len(different) > 1):
        raise DataError(
            f"splits must be files or folders, or patterns of their names (got the column {column} of {table}); divide "
            f"the images by it, or set split.by_name=false to pool them"
        )


class Patterns:
    """The patterns of the configuration, and which of them matched.

    A pattern matches a path, a folder above it, or the name of either; ``*`` matches any text.
    """

    def __init__(self, split: SplitConfig) -> None:
        self._patterns = split.patterns
        self._matched: set[tuple[str, str]] = set()

    def __bool__(self) -> bool:
        return any(self._patterns.values())

    def decide(self, path: str) -> tuple[str, str] | None:
        """``train``, ``validation``, ``test`` or ``ignore`` for a path, and the folder or file that matched.

        Raises:
            DataError: two patterns decide differently.
        """
        parts = path.split("/")
        decisions: dict[str, str] = {}
        for depth in range(1, len(parts) + 1):
            above, name = "/".join(parts[:depth]), parts[depth - 1]
            for decision, patterns in self._patterns.items():
                for pattern in patterns:
                    if fnmatchcase(above, pattern.rstrip("/")) or fnmatchcase(name, pattern.rstrip("/")):
                        self._matched.add((decision, pattern))
                        decisions.setdefault(decision, above)
        if "ignore" in decisions:
            return "ignore", decisions["ignore"]
        if len(decisions) > 1:
            both = " and ".join(sorted(decisions))
            raise DataError(f"patterns of split must not overlap (got {both} for {path}); narrow one of them")
        return next(iter(decisions.items()), None)

    def check(self, where: str) -> None:
        """Check that every pattern matched something.

        Raises:
            DataError: one did not.
        """
        for decision, patterns in self._patterns.items():
            for pattern in patterns:
                if (decision, pattern) not in self._matched:
                    raise DataError(
                        f"split.{decision} must match something in {where} (got {pattern!r}, which matches nothing); "
                        f"correct it"
                    )


def roles_of_files(names: Sequence[str], split: SplitConfig, kind: str) -> list[Role | None]:
    """The split of every table or tar, by its path below the source: by its file name, or by the folders above it.

    Args:
        names: paths below the source.
        split: patterns, and whether names count.
        kind: ``tables`` or ``tars``, for messages.

    Returns:
        Roles in order; all None if no name means a split, ``ignore`` for files that a pattern leaves out.

    Raises:
        DataError: some names mean a split and others do not.
    """
    patterns = Patterns(split)
    roles: list[Role | None] = []
    for name in names:
        decision = patterns.decide(name)
        roles.append(decision[0] if decision is not None else _role_of_path(name) if split.by_name else None)
    patterns.check(kind)
    if not any(role in ("train", "validation", "test") for role in roles):
        pair = paired(names) if split.by_name else None
        if pair is not None:
            raise DataError(
                f"{kind} whose names may mean splits must be assigned to splits (got {pair[0]} and {pair[1]}); name "
                f"them with split.train and split.test, or set split.by_name=false"
            )
        return [role if role == "ignore" else None for role in roles]
    unknown = next((name for name, role in zip(names, roles, strict=True) if role is None), None)
    if unknown is not None:
        known = next(name for name, role in zip(names, roles, strict=True) if role not in (None, "ignore"))
        raise DataError(
            f"{kind} must all belong to a split, or none (got {known} beside {unknown}); say which is which with "
            f"split.train, split.test and split.ignore, or set split.by_name=false"
        )
    return roles


def _role_of_path(path: str) -> Role | None:
    """The split that the file's name means, else the nearest folder that means one."""
    for part in reversed(re.sub(r"\.[^/]*$", "", path).split("/")):
        role = role_of(part)
        if role == "several":
            raise DataError(
                f"a name must mean one split (got {part} in {path}); say which with split.train, split.test and "
                f"split.ignore, or set split.by_name=false"
            )
        if role is not None:
            return role
    return None


@dataclass
class Group:
    """The images of one split of a source.

    Args:
        names: folders, tables or tars that make it.
        num_images: how many images it has.
        num_labelled: how many of them have labels: all, or none.
    """

    names: list[str] = field(default_factory=list)
    num_images: int = 0
    num_labelled: int = 0

    @property
    def words(self) -> str:
        """``train-0.parquet`` or ``train-0.parquet and 3 more``."""
        more = len(self.names) - 1
        return f"{self.names[0]} and {more} more" if more else self.names[0]


class SourceFile(NamedTuple):
    """A table or tar, which belongs to one split as a whole.

    Args:
        name: path below the source.
        role: its split; None in a source without splits.
        num_images: how many images it has.
        num_labelled: how many of them have labels.
        unlabelled: the first image without a label, for messages; empty if all have one.
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
        packed: name under which each role is packed; roles that are left out are missing.
        official: whether the source has a training and a held-out split; if not, all is packed as one and divided.
        lines: what a user must know, to be printed.
        words: for the manifest; empty without a split.
    """

    packed: dict[Role, str]
    official: bool
    lines: tuple[str, ...]
    words: str

    def keeps(self, role: Role | None) -> bool:
        """Whether images of a role are packed."""
        return role is None or role in self.packed

    def codes(self, roles: Sequence[Role | None]) -> NDArray[np.int8] | None:
        """Index in `PACKED` of every image, from its role; None without an official split."""
        if not self.official:
            return None
        return np.array([PACKED.index(self.packed[role or ""]) for role in roles], dtype=np.int8)


def settle_files(files: Sequence[SourceFile], split: SplitConfig) -> Settled:
    """Choose which splits of tables or tars are packed.

    Raises:
        DataError: some images of a split have labels and some have none, or as `settle`.
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
                f"all samples must have labels, or none (got none for {first}); label or remove it, or leave its file "
                f"out with split.ignore"
            )
    return settle({role: group for role, group in groups.items() if role is not None}, split)


def settle(groups: dict[Role, Group], split: SplitConfig) -> Settled:
    """Choose which splits are packed.

    Raises:
        DataError: there is no training split, or a split that a pattern names does not fit ``train``.
    """
    held_out: tuple[Role, ...] = ("test", "validation")
    wanted = [role for role in held_out if split.patterns[role]]
    if not groups:
        return Settled({}, official=False, lines=(), words="")
    missing = next((role for role in wanted if role not in groups), None)
    if missing is not None:
        raise DataError(
            f"split.{missing} must match images that are not left out (got none: split.ignore matches them too, or "
            f"there are no images in what it matches); correct it"
        )
    if len(groups) == 1:
        role, group = next(iter(groups.items()))
        line = f"{group.words}: the only split ({role}); it is divided like images without a split"
        return Settled({role: "train"}, official=False, lines=(line,), words=f"{role} split alone")
    if "train" not in groups:
        raise DataError(
            f"a source with splits must have one for training (got {_list(groups)}); name it with split.train"
        )
    train = groups["train"]
    labelled = train.num_labelled > 0
    fits = {role: group for role, group in groups.items() if (group.num_labelled > 0) == labelled and role != "other"}
    if split.kind == "stratified":
        lines = [f"split.kind=stratified: {_list(fits)} are pooled and divided again"]
        lines += [_left_out(role, group, labelled=True) for role, group in groups.items() if role not in fits]
        return Settled(
            dict.fromkeys(fits, "train"), official=False, lines=tuple(lines), words=f"pooled ({', '.join(fits)})"
        )
    wrong = next((role for role in wanted if role not in fits), None)
    if wrong is not None:
        have, want = ("no labels", "labels") if labelled else ("labels", "no labels")
        raise DataError(
            f"split.{wrong} must fit the training images (got {have} in {groups[wrong].words}, {want} in "
            f"{train.words}); remove the pattern, or pack it as a source of its own"
        )
    chosen: dict[Role, str] = {role: role for role in wanted}
    if not chosen:
        chosen = {role: "test" for role in held_out if role in fits}
        chosen = dict(list(chosen.items())[:1])
    unfit = next((role for role in held_out if role in groups), None)
    if not labelled and not chosen and unfit is not None:
        raise DataError(
            f"training images must have labels where the held-out ones have (got none in {train.words}, "
            f"labels in {groups[unfit].words}); label them, or leave the others out with split.ignore"
        )
    packed: dict[Role, str] = {"train": "train", **chosen}
    lines = [f"{groups[role].words}: {name} ({role} split, {_images(groups[role])})" for role, name in packed.items()]
    lines += [_left_out(role, group, labelled) for role, group in groups.items() if role not in packed]
    if not chosen:
        lines.append("no held-out split with labels: split.test_fraction of each class is held out of train")
        return Settled(packed, official=False, lines=tuple(lines), words="training split alone")
    words = ", ".join(role if name == role else f"{role} as {name}" for role, name in packed.items())
    left_out = [f"{role} left out" for role in groups if role not in packed]
    words = f"official split ({'; '.join(filter(None, (words, ', '.join(left_out))))})"
    return Settled(packed, official=True, lines=tuple(lines), words=words)


def _left_out(role: Role, group: Group, labelled: bool) -> str:
    if labelled and not group.num_labelled:
        why = "has no labels; pack it as a source of its own to use it"
    elif role in PACKED:
        why = f"is not packed; name it with split.{role} to pack it"
    else:
        why = "is neither for training nor held out; name it with split.train or split.test to pack it"
    return f"left out: {group.words} ({role} split, {_images(group)}) {why}"


def _images(group: Group) -> str:
    return counted(group.num_images, "image")


def _list(groups: dict[Role, Group]) -> str:
    return ", ".join(f"{role} in {group.words}" for role, group in groups.items())


def counted(number: int, noun: str) -> str:
    """``1 image``, ``2,000 images``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def named(names: Sequence[str], most: int) -> str:
    """``cat, dog, ..``: the first names of a list."""
    return ", ".join(names[:most]) + (", .." if len(names) > most else "")


def train_then_test(num_train: int, num: int) -> NDArray[np.int8]:
    """`ImageSource.official` of a source whose training images come first."""
    return np.where(np.arange(num) < num_train, PACKED.index("train"), PACKED.index("test")).astype(np.int8)
