"""Read labels (numbers or text) from tar members, columns and tables, and derive class names and class numbers."""

import csv
import io
import json
import re
import unicodedata
from collections.abc import Sequence
from itertools import permutations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tarflow_scale import storage
from tarflow_scale.errors import DataError
from tarflow_scale.shards.sources.splits import named

__all__ = [
    "as_label",
    "class_warnings",
    "classes_of_labels",
    "numbered_classes",
    "parse_json",
    "read_label_names",
    "refuse_mixture",
    "rows_of",
]

_MAX_LABEL = 2**20
"""Largest valid label. A larger label is most likely a mistake; accepting it would create that many class names."""
_KEY_COLUMNS = ("label", "id", "class", "class_id", "label_id", "wnid", "synset", "index")
"""Possible headers of the first column in a table of class names."""


def as_label(value: Any, origin: str) -> int | str | None:
    """Convert a label to a non-negative integer or to text; return None for -1, which usually means "no label".

    Args:
        value: a number, or text with or without white space around it.
        origin: name of the sample, for messages.

    Raises:
        DataError: the value is not a valid label: for example, a list, a fraction, empty text, or too large a number.
    """
    label = value.decode(errors="replace") if isinstance(value, bytes) else value
    if isinstance(label, np.integer):
        label = int(label)
    if isinstance(label, str):
        label = label.lstrip("\ufeff").strip()
        if re.fullmatch(r"-?\d{1,9}", label):
            label = int(label)
    if isinstance(label, bool) or not isinstance(label, int | str) or label == "":
        raise DataError(
            f"a label must be one whole number or text (got {str(value)[:40]!r} for {origin}); correct it, or set "
            f"source.label_column to the column or member that holds the label"
        )
    if label == -1:
        return None
    if not 0 <= label <= _MAX_LABEL if isinstance(label, int) else re.fullmatch(r"-?\d+", label):
        raise DataError(
            f"a label must be a whole number from 0 to {_MAX_LABEL} (got {label!s:.40} for {origin}); correct it"
        )
    return label


def numbered_classes(labels: NDArray[np.int64]) -> tuple[str, ...]:
    """Class names for labels that are numbers without names: ``0`` to the highest label.

    Raises:
        DataError: a label is larger than `_MAX_LABEL`, about a million.
    """
    highest = int(labels.max(initial=0))
    if highest > _MAX_LABEL:
        raise DataError(f"labels must not exceed {_MAX_LABEL} (got {highest}); correct them")
    return tuple(str(label) for label in range(highest + 1))


def classes_of_labels(
    labels: Sequence[int | str | None], names_path: str | None, origin: str
) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """The class names of a source, and the class number of each image, ``(n,)``.

    Labels that are numbers are the class numbers. Labels that are text are numbered in alphabetical order, or in the
    order of the table of class names. If there are no labels, there are no names and all numbers are 0.

    Args:
        labels: label of each image; None for all images if there are no labels.
        names_path: path of the table of class names (see `read_label_names`); None if there is none.
        origin: the source, for messages.

    Raises:
        DataError: numbers and text are mixed, or a label is not in the table.
    """
    present = [label for label in labels if label is not None]
    if not present:
        return (), np.zeros(len(labels), dtype=np.int64)
    refuse_mixture(present, origin)
    names = read_label_names(names_path)
    if names is None and isinstance(present[0], int):
        numbers = np.array(present, dtype=np.int64)
        return numbered_classes(numbers), numbers
    names = names or {name: name for name in sorted(map(str, set(present)))}
    missing = next((label for label in present if label not in names), None)
    if missing is not None:
        raise DataError(
            f"source.label_names must name every label (got no name for {missing!r} of {origin}, but names for "
            f"{', '.join(map(repr, list(names)[:3]))} ..); add the missing names"
        )
    keys = [key for key in names if isinstance(key, int)]
    if len(keys) == len(names):
        return tuple(names.get(label, str(label)) for label in range(max(keys) + 1)), np.array(present, dtype=np.int64)
    number_of = {key: number for number, key in enumerate(names)}
    return tuple(names.values()), np.array([number_of[label] for label in present], dtype=np.int64)


def refuse_mixture(labels: Sequence[int | str | None], origin: str) -> None:
    """Refuse a source where some labels are numbers and some are text.

    Raises:
        DataError: the labels are mixed.
    """
    text = next((label for label in labels if isinstance(label, str)), None)
    number = next((label for label in labels if isinstance(label, int)), None)
    if text is not None and number is not None:
        raise DataError(
            f"labels must be all numbers or all text (got {number} and {text!r} in {origin}); correct them, or set "
            f"source.label_column to the column or member that holds the label"
        )


def read_label_names(path: str | None) -> dict[int | str, str] | None:
    """Read a table of class names; returns names by label, in the order of the file, or None if ``path`` is None.

    A JSON list names the labels 0, 1, ..; a JSON mapping is ``{label: name}`` or ``{name: number}``. Any other file has
    a row ``label,name`` for each class, with or without a header, or one name per line.

    Raises:
        DataError: the file does not exist, has another format, or names a label twice.
    """
    if path is None:
        return None
    if not storage.exists(path):
        raise DataError(f"there is no {path}; check source.label_names")
    content = storage.read_bytes(path)
    if path.endswith(".json"):
        names = parse_json(content, path)
        if isinstance(names, list):
            pairs = [(number, str(name)) for number, name in enumerate(names)]
        elif isinstance(names, dict) and all(type(value) is int for value in names.values()):
            pairs = sorted((number, str(name)) for name, number in names.items())
        elif isinstance(names, dict):
            pairs = [(as_label(key, path), str(value)) for key, value in names.items()]
        else:
            raise DataError(
                f"{path} must hold a JSON list or mapping of names (got {type(names).__name__}); correct it"
            )
    else:
        rows = rows_of(content, path)
        if rows and len(rows[0]) > 1 and rows[0][0].lower() in _KEY_COLUMNS:
            rows = rows[1:]
        if all(len(row) == 1 for row in rows):
            pairs = [(number, row[0]) for number, row in enumerate(rows)]
        else:
            pairs = [(as_label(row[0], path), " ".join(row[1:])) for row in rows]
    table = {label: name for label, name in pairs if label is not None}
    if not table or len(table) < len(pairs):
        raise DataError(
            f"{path} must name every label once (got {len(pairs)} rows for {len(table)} labels); correct it"
        )
    return table


def parse_json(content: bytes, origin: str) -> Any:
    """Parse JSON, with or without a byte order mark.

    Raises:
        DataError: the content is not JSON.
    """
    try:
        return json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{origin} must be JSON ({' '.join(str(error).split())}); correct it") from error


def rows_of(content: bytes, origin: str) -> list[list[str]]:
    """Rows of a text table.

    The separator is the first of tab, comma, semicolon and ``|`` that occurs in every row, or else white space.

    Raises:
        DataError: the content is not UTF-8 text.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{origin} must be UTF-8 text (got a wrong byte at {error.start}); save it as UTF-8") from error
    lines = [line for line in text.splitlines() if line.strip()]
    for separator in ("\t", ",", ";", "|"):
        if lines and all(separator in line for line in lines):
            rows = csv.reader(io.StringIO("\n".join(lines)), delimiter=separator)
            return [[cell.strip() for cell in row] for row in rows]
    return [line.split() for line in lines]


def class_warnings(
    class_names: Sequence[str], labels: NDArray[np.int64], official: NDArray[np.int8] | None, packed: Sequence[str]
) -> list[str]:
    """Warnings: class names that differ only by case or Unicode form, and classes without images in one or all splits.

    Args:
        class_names: names of the classes, in the order of their labels.
        labels: label of each image, ``(n,)``.
        official: split of each image, as an index into ``packed``, ``(n,)``; None if there is no official split.
        packed: names of the splits.
    """
    lines: list[str] = []
    alike: dict[str, list[str]] = {}
    for name in class_names:
        alike.setdefault(unicodedata.normalize("NFKC", name).casefold().strip(), []).append(repr(name))
    for names in alike.values():
        if len(names) > 1:
            lines.append(
                f"warning: classes {' and '.join(names)} differ only by case or Unicode form; rename one if they are "
                f"the same class"
            )

    def listed(missing: set[int]) -> str:
        return named([class_names[label] for label in sorted(missing)], 5)

    num = len(class_names)
    empty = set(range(num)) - set(np.unique(labels).tolist())
    if empty:
        lines.append(f"warning: {len(empty)} of {num} classes have no image: {listed(empty)}")
    if official is None or not class_names:
        return lines
    seen = {code: set(np.unique(labels[official == code]).tolist()) for code in np.unique(official).tolist()}
    for code, other in permutations(seen, 2):
        missing = seen[code] - seen[other]
        if missing:
            lines.append(
                f"warning: {len(missing)} of {num} classes are in {packed[code]} and not in {packed[other]}: "
                f"{listed(missing)}"
            )
    return lines
