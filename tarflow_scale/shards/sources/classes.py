"""Labels as people have them, numbers or text, in members, columns and tables; and the classes that they make."""

import csv
import io
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tarflow_scale import storage
from tarflow_scale.errors import DataError

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
"""More classes than any data set has; a larger label is a mistake, and would be as many class names."""

_KEY_COLUMNS = ("label", "id", "class", "class_id", "label_id", "wnid", "synset", "index")
"""What the first column of a table of class names is called, where it has a header."""


def as_label(value: Any, what: str) -> int | str | None:
    """A label: a number that is not negative, text, or None for -1, which is the usual sign of no label.

    Args:
        value: what stands for the label: a number, or text with or without line ends around it.
        what: the sample, for messages.

    Raises:
        DataError: it is anything else: several labels, a fraction, empty text.
    """
    text = value.decode(errors="replace") if isinstance(value, bytes) else value
    if isinstance(text, np.integer):
        text = int(text)
    if isinstance(text, str):
        text = text.lstrip("\ufeff").strip()
        if re.fullmatch(r"-?\d{1,9}", text):
            text = int(text)
        elif re.fullmatch(r"-?\d+", text):
            raise DataError(
                f"a label must be a whole number up to {_MAX_LABEL} (got {text:.40} for {what}); correct it"
            )
    if isinstance(text, bool) or not isinstance(text, int | str) or text == "":
        raise DataError(
            f"a label must be one whole number or text (got {str(value)[:40]!r} for {what}); correct it, or name what "
            f"holds the class with source.label_column"
        )
    if isinstance(text, int) and text == -1:
        return None
    if isinstance(text, int) and not 0 <= text <= _MAX_LABEL:
        raise DataError(f"a label must be a whole number up to {_MAX_LABEL} (got {text} for {what}); correct it")
    return text


def numbered_classes(labels: NDArray[np.int64]) -> tuple[str, ...]:
    """Class names where a source has numbers alone: 0 to the highest label.

    Raises:
        DataError: there would be a great many.
    """
    highest = int(labels.max(initial=0))
    if highest > _MAX_LABEL:
        raise DataError(f"labels must not exceed {_MAX_LABEL} (got {highest}); correct them")
    return tuple(str(label) for label in range(highest + 1))


def classes_of_labels(
    labels: Sequence[int | str], names: Mapping[int | str, str] | None, what: str
) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Class names and numbers of labels.

    Numbers stay what they are. Text becomes the classes in alphabetical order, or in the order of ``names``.

    Args:
        labels: of every image.
        names: the table of `read_label_names`, if there is one.
        what: the source, for messages.

    Raises:
        DataError: numbers and text are mixed, or a label is not in the table.
    """
    refuse_mixture(labels, what)
    if names is not None:
        return _named_classes(labels, names, what)
    text = [label for label in labels if isinstance(label, str)]
    if not text:
        numbers = np.array(labels, dtype=np.int64)
        return numbered_classes(numbers), numbers
    classes = tuple(sorted(set(text)))
    number_of = {name: number for number, name in enumerate(classes)}
    return classes, np.array([number_of[label] for label in text], dtype=np.int64)


def refuse_mixture(labels: Sequence[int | str | None], what: str) -> None:
    """See that labels are of one kind.

    Raises:
        DataError: some are numbers and some are text.
    """
    text = next((label for label in labels if isinstance(label, str)), None)
    number = next((label for label in labels if isinstance(label, int)), None)
    if text is not None and number is not None:
        raise DataError(
            f"labels must be all numbers or all text (got {number} and {text!r} in {what}); correct them, or name what "
            f"holds the label with source.label_column"
        )


def _named_classes(
    labels: Sequence[int | str], names: Mapping[int | str, str], what: str
) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    missing = next((label for label in labels if label not in names), None)
    if missing is not None:
        raise DataError(
            f"source.label_names must name every label (got none for {missing!r} of {what}; it names "
            f"{', '.join(map(repr, list(names)[:3]))} ..); complete it"
        )
    numbers = [key for key in names if isinstance(key, int)]
    if len(numbers) == len(names):
        classes = tuple(names.get(label, str(label)) for label in range(max(numbers) + 1))
        return classes, np.array(labels, dtype=np.int64)
    number_of = {key: number for number, key in enumerate(names)}
    return tuple(names.values()), np.array([number_of[label] for label in labels], dtype=np.int64)


def read_label_names(path: str | None) -> dict[int | str, str] | None:
    """Names of classes by label, in the order of the file; None without a file.

    A JSON list names the labels 0, 1, ..; a JSON mapping is ``{label: name}`` or ``{name: number}``. Any other file has
    a row ``label,name`` for each class (a header such as ``label,name`` may stand first), or one name a line.

    Raises:
        DataError: it is no such file, or names a label twice.
    """
    if path is None:
        return None
    if not storage.exists(path):
        raise DataError(f"there is no {path}; check source.label_names")
    content = storage.read_bytes(path)
    if path.endswith(".json"):
        found = parse_json(content, path)
        if isinstance(found, list):
            pairs = [(number, str(name)) for number, name in enumerate(found)]
        elif isinstance(found, dict) and all(type(value) is int for value in found.values()):
            pairs = sorted((number, str(name)) for name, number in found.items())
        elif isinstance(found, dict):
            pairs = [(as_label(key, path), str(value)) for key, value in found.items()]
        else:
            raise DataError(f"{path} must hold a list or mapping of names (got {type(found).__name__}); correct it")
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
        raise DataError(f"{path} must name every label once (got {len(pairs)} rows, {len(table)} labels); correct it")
    return table


def parse_json(content: bytes, what: str) -> Any:
    """JSON, with or without a byte order mark.

    Raises:
        DataError: it is none.
    """
    try:
        return json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what} must be JSON ({' '.join(str(error).split())}); correct it") from error


def rows_of(content: bytes, what: str) -> list[list[str]]:
    """Rows of a table of text: separated by tabs, commas, semicolons, bars or blanks, whichever all rows have.

    Raises:
        DataError: it is no text.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{what} must be UTF-8 text (got byte {error.start}); save it as UTF-8") from error
    lines = [line for line in text.splitlines() if line.strip()]
    for separator in ("\t", ",", ";", "|"):
        if lines and all(separator in line for line in lines):
            rows = csv.reader(io.StringIO("\n".join(lines)), delimiter=separator)
            return [[cell.strip() for cell in row] for row in rows]
    return [line.split() for line in lines]


def class_warnings(
    class_names: Sequence[str], labels: NDArray[np.int64], official: NDArray[np.int8] | None, packed: Sequence[str]
) -> list[str]:
    """What a user must know of the classes: those of one split only, and names that differ too little.

    Args:
        class_names: in the order of their labels.
        labels: ``(n,)`` of the images.
        official: ``(n,)`` index of each image's split in ``packed``; None without an official split.
        packed: names of splits.
    """
    lines: list[str] = []
    plain: dict[str, list[str]] = {}
    for name in class_names:
        plain.setdefault(unicodedata.normalize("NFKC", name).casefold().strip(), []).append(name)
    for names in plain.values():
        if len(names) > 1:
            shown = " and ".join(repr(name) for name in names)
            lines.append(
                f"warning: classes {shown} differ only by case or Unicode form; rename one if they are the same"
            )
    empty = sorted(set(range(len(class_names))) - set(np.unique(labels).tolist()))
    if empty:
        shown = ", ".join(class_names[label] for label in empty[:5]) + (", .." if len(empty) > 5 else "")
        lines.append(f"warning: {len(empty)} of {len(class_names)} classes have no image: {shown}")
    if official is None or not class_names:
        return lines
    seen = {code: set(np.unique(labels[official == code]).tolist()) for code in np.unique(official).tolist()}
    for code, here in seen.items():
        for other, there in seen.items():
            alone = sorted(here - there)
            if code != other and alone:
                shown = ", ".join(str(class_names[int(label)]) for label in alone[:5]) + (
                    ", .." if len(alone) > 5 else ""
                )
                lines.append(
                    f"warning: {len(alone)} of {len(class_names)} classes are in {packed[code]} and not in "
                    f"{packed[other]}: {shown}"
                )
    return lines
