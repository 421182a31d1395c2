"""Vectors of numbers as a source: arrays of an ``.npz``, or columns of a CSV."""

import csv
import io
import re
from contextlib import suppress
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tarflow_scale import storage
from tarflow_scale.errors import DataError
from tarflow_scale.records import VectorFacts
from tarflow_scale.shards.events import VectorEvent
from tarflow_scale.shards.images import NPY_FAULTS
from tarflow_scale.shards.sources.classes import as_label, classes_of_labels, numbered_classes
from tarflow_scale.shards.sources.source import ImageSource
from tarflow_scale.shards.sources.splits import train_then_test

__all__ = ["VectorSource"]


class VectorSource(ImageSource):
    """Vectors of numbers, which are used without scaling or centring.

    * ``.npz``: the array ``x (N, D)``; optionally ``labels (N,)`` of whole numbers and ``conditions (N, K)``. Arrays
      ``x_test``, ``labels_test`` and ``conditions_test`` form an official test split.
    * ``.csv``: a header, and a row for each sample. All columns are values, except the columns that the arguments name.

    Args:
        path: path or URL of the file.
        label_column: column of a CSV with the class of each sample; None if there are no classes.
        condition_columns: columns of a CSV with the condition of each sample.

    Raises:
        DataError: the file cannot be read, a number is missing or not finite, or the shapes of arrays do not agree.
    """

    def __init__(self, path: str, label_column: str | None = None, condition_columns: tuple[str, ...] = ()) -> None:
        content = storage.read_bytes(path)
        suffix = PurePosixPath(path).suffix.lower()
        if suffix == ".npz":
            if label_column or condition_columns:
                raise DataError(
                    f"source.label_column and condition_columns work only for CSV files (got {path}); in an .npz file, "
                    f"name the arrays labels and conditions"
                )
            values, conditions, labels, names, official = _from_npz(content, path)
        elif suffix == ".csv":
            values, conditions, labels, names = _from_csv(content, path, label_column, condition_columns)
            official = None
        else:
            raise DataError(f"vectors must be an .npz or .csv file (got {path}); convert them")
        self._event = VectorEvent(VectorFacts(num_values=values.shape[1], num_conditions=conditions.shape[1]))
        with np.errstate(over="ignore"):  # numbers too large for float32 become infinite and are refused below
            self._numbers = np.ascontiguousarray(np.concatenate([values, conditions], axis=1), "<f4")
        if not np.isfinite(self._numbers).all():
            row = int(np.flatnonzero(~np.isfinite(self._numbers).all(axis=1))[0])
            raise DataError(
                f"numbers of {path} must be finite in float32 (got infinity or NaN in sample {row}); correct or remove "
                f"the sample"
            )
        self.name = PurePosixPath(path).stem
        self.description = f"vectors from {PurePosixPath(path).name}"
        self.class_names, self.labels, self.official = names, labels, official
        self.digest = storage.digest(content)

    @property
    def event(self) -> VectorEvent:
        """The type of the samples."""
        return self._event

    def _image(self, number: int) -> NDArray[np.uint8]:
        """The float32 bytes of vector ``number``, ``(1, 1, 4 (D + K))`` uint8."""
        return self._numbers[number].view(np.uint8)[None, None]


_Table = tuple[NDArray[Any], NDArray[Any], NDArray[np.int64], tuple[str, ...]]


def _from_npz(content: bytes, path: str) -> tuple[*_Table, NDArray[np.int8] | None]:
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            arrays: dict[str, NDArray[Any]] = {name: file[name] for name in file.files}
    except (*NPY_FAULTS, AttributeError) as error:
        raise DataError(f"{path} cannot be read ({' '.join(str(error).split())}); write it with numpy.savez") from error
    known = {f"{name}{end}" for name in ("x", "labels", "conditions") for end in ("", "_test")}
    if "x" not in arrays or not arrays.keys() <= known:
        raise DataError(
            f"{path} must hold the array x, and may hold {', '.join(sorted(known - {'x'}))} (got {sorted(arrays)}); "
            f"rename or remove the arrays"
        )
    parts = [_part(arrays, "", path), *([_part(arrays, "_test", path)] if "x_test" in arrays else [])]
    if len({(x.shape[1], c.shape[1], y is None) for x, c, y in parts}) > 1 or any(
        name.endswith("_test") and "x_test" not in arrays for name in arrays
    ):
        raise DataError(
            f"{path} must have the same arrays and columns with and without the suffix _test (got {sorted(arrays)}); "
            f"correct it"
        )
    x, conditions = np.concatenate([x for x, _, _ in parts]), np.concatenate([c for _, c, _ in parts])
    label_arrays = [y for _, _, y in parts if y is not None]
    labels = np.concatenate(label_arrays) if label_arrays else np.zeros(len(x), np.int64)
    official = train_then_test(len(parts[0][0]), len(x)) if len(parts) > 1 else None
    return x, conditions, labels, numbered_classes(labels) if label_arrays else (), official


def _part(
    arrays: dict[str, NDArray[Any]], end: str, path: str
) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.int64] | None]:
    x, labels = arrays[f"x{end}"], arrays.get(f"labels{end}")
    conditions = arrays.get(f"conditions{end}", np.zeros((len(x), 0), np.float32) if x.ndim else None)
    for name, array in (("x", x), ("conditions", conditions)):
        if array is None or array.ndim != 2 or len(array) != len(x) or array.dtype.kind not in "fiu":
            got = "nothing" if array is None else f"{array.dtype} {array.shape}"
            raise DataError(f"{name}{end} of {path} must be an array of numbers (N, columns) (got {got}); reshape it")
    if x.shape[1] == 0:
        raise DataError(f"x{end} of {path} must have at least one column (got none); reshape it")
    if labels is not None and (labels.shape != (len(x),) or labels.dtype.kind not in "iu" or (labels < 0).any()):
        raise DataError(
            f"labels{end} of {path} must be {len(x)} whole numbers of at least 0 (got {labels.dtype} {labels.shape}); "
            f"correct them"
        )
    assert conditions is not None
    return x, conditions, None if labels is None else labels.astype(np.int64)


def _from_csv(content: bytes, path: str, label_column: str | None, condition_columns: tuple[str, ...]) -> _Table:
    try:
        rows = list(csv.reader(io.StringIO(content.decode("utf-8-sig")), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a CSV file in UTF-8 ({error}); convert it") from error
    rows = [row for row in rows if row]
    if len(rows) < 2:
        raise DataError(f"{path} must have a header and a row for each sample (got {len(rows)} rows); add them")
    header = [name.strip() for name in rows[0]]
    _check_header(header, path)
    special = [*([label_column] if label_column else []), *condition_columns]
    unknown = sorted(set(special) - set(header))
    if unknown or len(set(header)) < len(header) or len(set(special)) < len(special):
        raise DataError(
            f"{path} must have each column once (got {header}, and the settings name {special}); correct the names"
        )
    values = [number for number, name in enumerate(header) if name not in special]
    if not values:
        raise DataError(f"{path} must have a column of values (got only labels and conditions: {header}); add one")
    numbers = np.array([_numbers(row, line, header, label_column, path) for line, row in enumerate(rows[1:], start=2)])
    names: tuple[str, ...] = ()
    labels = np.zeros(len(numbers), np.int64)
    if label_column:
        texts = [row[header.index(label_column)].strip() for row in rows[1:]]
        if "" in texts:
            raise DataError(
                f"every row of {path} must have a label (got none in line {texts.index('') + 2}); add the label or "
                f"remove the row"
            )
        label_of_row = [as_label(text, f"line {line} of {path}") for line, text in enumerate(texts, start=2)]
        if None in label_of_row:
            line = label_of_row.index(None) + 2
            raise DataError(f"labels of {path} must not be -1 (got -1 in line {line}); remove the row")
        names, labels = classes_of_labels(label_of_row, None, path)
    return numbers[:, values], numbers[:, [header.index(name) for name in condition_columns]], labels, names


def _check_header(header: list[str], path: str) -> None:
    """Refuse a header that uses a separator other than a comma, has a column without a name, or has only numbers."""
    separator = next((mark for mark in (";", "\t", "|") if len(header) == 1 and mark in header[0]), None)
    if separator is not None:
        raise DataError(f"columns of {path} must be separated by commas (got {separator!r}); save it with commas")
    if "" in header or any(re.fullmatch(r"Unnamed: \d+", name) for name in header):
        raise DataError(
            f"every column of {path} must have a name (got {header[:4]}; pandas writes its index as a column without a "
            f"name); save it with index=False"
        )
    with suppress(ValueError):
        numbers = [float(name) for name in header]
        raise DataError(f"{path} must have a header (got {numbers[:4]} in its first line); name the columns there")


def _numbers(row: list[str], line: int, header: list[str], label_column: str | None, path: str) -> list[float]:
    """The numbers of a row, with 0 in place of the label."""
    if len(row) != len(header):
        raise DataError(f"rows of {path} must have {len(header)} columns (got {len(row)} in line {line}); correct it")
    numbers: list[float] = []
    for name, text in zip(header, row, strict=True):
        try:
            numbers.append(0.0 if name == label_column else float(text))
        except ValueError:
            raise DataError(
                f"columns of {path} must be numbers (got {text[:40]!r} in line {line}, column {name}); if this is the "
                f"column of labels, set source.label_column={name}"
            ) from None
    return numbers
