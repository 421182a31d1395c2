"""Find the splits of a source from patterns and names, with the same rules for folders, zips, tables and tars.

1. Patterns of the configuration have priority: ``split.train``, ``split.validation``, ``split.test``, ``split.ignore``.
2. Without a matching pattern the name decides, unless ``split.by_name`` is false: ``train``, ``Training``, ``val2017``,
   ``seg_test``, ``imagenet-val-000003.tar``. `_WORDS` has the words and their meanings.
3. If no name means a split, the source has no splits; the share ``split.test_fraction`` of each class is held out.
4. A source where some names mean a split and others do not is refused: the configuration must assign them.
5. `tarflow_scale.shards.sources.split_choice` decides which of the splits are packed.
"""

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

import numpy as np
from numpy.typing import NDArray

from tarflow_scale.config.prepare import SplitConfig
from tarflow_scale.errors import DataError

__all__ = [
    "PACKED",
    "SPLIT_COLUMNS",
    "Patterns",
    "Role",
    "counted",
    "looks_split",
    "named",
    "other_words",
    "paired",
    "refuse_split_column",
    "role_of",
    "roles_of_files",
    "train_then_test",
    "unread_lists",
]

Role = str
"""Split of an image: ``train``, ``validation``, ``test``, or ``other`` for any other split, such as ``extra``."""
PACKED = ("train", "validation", "test")
"""Names of packed splits; the values of `ImageSource.official` are indices into this tuple."""

_WORDS: dict[str, Role] = {
    **dict.fromkeys(("train", "training", "trn", "trainval", "trainset", "traindata"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validate", "validating", "dev", "devel", "valset"), "validation"),
    **dict.fromkeys(("test", "testing", "tst", "eval", "evaluation", "holdout", "heldout", "testset"), "test"),
    **dict.fromkeys(("extra", "additional", "unlabeled", "unlabelled", "unsupervised", "pred", "predict"), "other"),
}
_STRONG = ("train", "training", "trainval", "val", "valid", "validation", "test", "testing")
"""Words that are hardly ever a class name. The other words of `_WORDS`, such as ``extra``, may also name a class."""
_LISTS = (".txt", ".csv", ".tsv", ".json", ".jsonl", ".lst", ".mat", ".npy")
_SPLITS = {"split", "splits", "partition", "partitions", "folds"}
"""Words in the names of files that list images of several splits."""
_FLAGS = ("is_train", "is_valid", "is_val", "is_test")
SPLIT_COLUMNS = (*_FLAGS, "split", "set", "subset", "partition", "usage", "phase", "fold", "dataset")


def words_of(name: str) -> list[str]:
    """The words of a name in lower case: ``seg`` and ``test`` for ``segTest_2``."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]


def role_of(name: str, strong: bool = False) -> Role | None:
    """The split that a name means; ``several`` if its words mean different splits; None if it means no split.

    Args:
        name: name of a file or folder.
        strong: use only words that are hardly ever a class name.
    """
    roles = {_WORDS[word] for word in words_of(name) if word in _WORDS and (not strong or word in _STRONG)}
    return None if not roles else roles.pop() if len(roles) == 1 else "several"


def other_words(name: str) -> tuple[str, ...]:
    """The words of a name that do not mean a split: ``seg`` and ``images`` for ``seg_train_images``."""
    return tuple(word for word in words_of(name) if word not in _WORDS)


def looks_split(name: str) -> bool:
    """Whether a name has only one word, and the word usually names a split, as in ``Train`` or ``val2017``."""
    words = words_of(name)
    return len(words) == 1 and words[0] in _STRONG


def paired(names: Sequence[str]) -> tuple[str, str] | None:
    """Find two names that differ only in the word for the split, such as ``mytrain0`` and ``mytest0``; else None."""
    by_lower = {name.lower(): name for name in names}
    for lower, name in by_lower.items():
        for word in ("test", "validation", "valid", "val", "dev", "eval"):
            other = by_lower.get(lower.replace("train", word))
            if "train" in lower and other is not None:
                return name, other
    return None


def unread_lists(files: Iterable[str]) -> list[str]:
    """A warning about lists such as ``meta/train.txt``, which may define splits but are not read."""
    roles: dict[str, Role] = {}
    for file in files:
        stem = file.rpartition("/")[2].rpartition(".")[0]
        role = role_of(stem, strong=True) if _SPLITS.isdisjoint(words_of(stem)) else "several"
        if role is not None and file.lower().endswith(_LISTS):
            roles[file] = role
    if "several" not in roles.values() and not {"train"} < set(roles.values()):
        return []
    return [
        f"warning: files that may define splits are not read ({named(list(roles), 4)}); move the images of each split "
        f"to a folder, or assign them with split.train and split.test"
    ]


def refuse_split_column(column: str, values: Iterable[object], table: str) -> None:
    """Refuse a table with a column that defines splits, because such columns are not read.

    Args:
        column: name of the column.
        values: its values.
        table: name of the table, for messages.

    Raises:
        DataError: the name and the values of the column define splits.
    """
    if column.lower() not in SPLIT_COLUMNS:
        return
    different = set(values)
    roles = {role_of(value) for value in different if isinstance(value, str)}
    if ("train" in roles and roles & {"test", "validation"}) or (column.lower() in _FLAGS and len(different) > 1):
        raise DataError(
            f"splits must be files, folders or patterns of names (got the column {column} in {table}); divide the "
            f"images by this column, or set split.by_name=false to ignore it"
        )


class Patterns:
    """The patterns of the section ``split``, and a record of which patterns matched.

    A pattern matches a file by its path or name, or by the path or name of a folder above it; ``*`` matches any text.
    """

    def __init__(self, split: SplitConfig) -> None:
        self._patterns = split.patterns
        self._matched: set[tuple[str, str]] = set()

    def __bool__(self) -> bool:
        return any(self._patterns.values())

    def decide(self, path: str) -> tuple[str, str] | None:
        """Match a path; returns its split or ``ignore``, and the folder or file that matched, or None if none matches.

        Raises:
            DataError: patterns of two splits match.
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
            raise DataError(
                f"patterns of two splits must not match the same path (got {both} for {path}); narrow one pattern"
            )
        return next(iter(decisions.items()), None)

    def check(self, where: str) -> None:
        """Check that every pattern matched something.

        Raises:
            DataError: a pattern matched nothing.
        """
        for decision, patterns in self._patterns.items():
            for pattern in patterns:
                if (decision, pattern) not in self._matched:
                    raise DataError(
                        f"split.{decision} must match something in {where} (got {pattern!r}, which matches nothing); "
                        f"correct it"
                    )


def roles_of_files(
    names: Sequence[str], split: SplitConfig, kind: str, where: str
) -> tuple[dict[str, Role | None], list[str]]:
    """The split of every table or tar, from patterns, its file name, or the folders above it.

    Args:
        names: paths below the source.
        split: the patterns, and whether splits are also recognized by name.
        kind: ``tables`` or ``tars``, for messages.
        where: path of the source, for messages.

    Returns:
        The split of each file that is not ignored, by its path (None if the source has no splits); and the paths of
        the files that ``split.ignore`` matches.

    Raises:
        DataError: some names mean a split and others do not, or all files are ignored.
    """
    patterns = Patterns(split)
    roles: dict[str, Role | None] = {}
    for name in names:
        decision = patterns.decide(name)
        roles[name] = decision[0] if decision is not None else _role_of_path(name) if split.by_name else None
    patterns.check(kind)
    ignored = [name for name, role in roles.items() if role == "ignore"]
    roles = {name: role for name, role in roles.items() if role != "ignore"}
    if not roles:
        raise DataError(f"split.ignore must not match all {kind} (got all {len(names)} of {where}); narrow it")
    if not any(role in PACKED for role in roles.values()):
        pair = paired(names) if split.by_name else None
        if pair is not None:
            raise DataError(
                f"{kind} whose names may mean splits must be assigned to splits (got {pair[0]} and {pair[1]}); name "
                f"them with split.train and split.test, or set split.by_name=false"
            )
        return dict.fromkeys(roles), ignored
    unknown = next((name for name, role in roles.items() if role is None), None)
    if unknown is not None:
        known = next(name for name, role in roles.items() if role is not None)
        raise DataError(
            f"either all {kind} or none must belong to a split (got {known} in a split and {unknown} in none); assign "
            f"the {kind} with split.train, split.test and split.ignore, or set split.by_name=false"
        )
    return roles, ignored


def _role_of_path(path: str) -> Role | None:
    """The split named by the file name, else by the nearest parent folder that names a split; None if there is none."""
    for part in reversed(re.sub(r"\.[^/]*$", "", path).split("/")):
        role = role_of(part)
        if role == "several":
            raise DataError(
                f"a name must not mean more than one split (got {part} in {path}); assign it with split.train, "
                f"split.test or split.ignore, or set split.by_name=false"
            )
        if role is not None:
            return role
    return None


def counted(number: int, noun: str) -> str:
    """A number and its noun: ``1 image``, ``2,000 images``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def named(names: Sequence[str], most: int) -> str:
    """The first ``most`` names of a list, as text: ``cat, dog, ..``."""
    return ", ".join(names[:most]) + (", .." if len(names) > most else "")


def train_then_test(num_train: int, num: int) -> NDArray[np.int8]:
    """Values of `ImageSource.official` for ``num`` images: the first ``num_train`` are ``train``, the rest ``test``."""
    return np.where(np.arange(num) < num_train, PACKED.index("train"), PACKED.index("test")).astype(np.int8)
