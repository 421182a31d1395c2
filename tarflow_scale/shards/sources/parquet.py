"""Parquet tables with image bytes, as Hugging Face data sets are stored.

A column holds images as ``struct<bytes, path>`` or as binary, another the label: a number, text, or a dictionary; names
of classes are in the schema's metadata. Rows of Parquet are compressed in groups and cannot be read one by one, so the
image bytes of the splits that are packed are first copied into one temporary file (in ``TMPDIR``, as large as the
images, removed when the process ends).
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tarflow_scale import storage
from tarflow_scale.config.prepare import SourceConfig, SplitConfig
from tarflow_scale.errors import DataError, needs_package
from tarflow_scale.runtime import console
from tarflow_scale.shards.sources import splits
from tarflow_scale.shards.sources.classes import as_label, classes_of_labels
from tarflow_scale.shards.sources.junk import junk_kind, kind_of
from tarflow_scale.shards.sources.source import EncodedSource
from tarflow_scale.shards.sources.split_choice import SourceFile, settle_files
from tarflow_scale.shards.sources.spool import Spool

__all__ = ["ParquetSource"]

_IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp", "picture", "photo", "pixel_values")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "cls", "class")
_ROWS = 256


@dataclass(frozen=True)
class _Table:
    """A table: its path below the source, its location, its columns, and the label of every row."""

    name: str
    location: str
    role: splits.Role | None
    image_column: str
    label_column: str | None
    other_columns: tuple[str, ...]
    labels: list[int | str | None]
    class_names: tuple[str, ...]


class ParquetSource(EncodedSource):
    """Rows of one ``.parquet`` file, or of all below a folder (or URL); their names or folders may mean splits.

    Raises:
        DataError: no pyarrow, no tables, no column of images or several, or tables that do not fit together.
    """

    def __init__(self, config: SourceConfig, split: SplitConfig) -> None:
        super().__init__(config)
        path = config.path or ""
        files, self.ignored = _tables(path)
        roles = splits.roles_of_files([name for name, _ in files], split, "tables")
        tables = [
            _read_table(name, location, role, config, split)
            for (name, location), role in zip(files, roles, strict=True)
            if role != "ignore"
        ]
        if not tables:
            raise DataError(f"split.ignore must leave tables (got none of {len(files)} in {path}); narrow it")
        settled = settle_files([_file_of(table) for table in tables], split)
        self.lines = (*settled.lines, *dict.fromkeys(map(_columns_used, tables)))
        kept = [table for table in tables if settled.keeps(table.role)]
        self.class_names, self.labels = _labels_of(kept, config, path)
        self.official = settled.codes([table.role for table in kept for _ in table.labels])
        self.name = storage.base_name(path).removesuffix(".parquet")
        self._spool = Spool()
        self._rows: list[tuple[str, int]] = []
        sizes: list[int] = []
        content = hashlib.sha256()
        with console.progress_bar(len(kept), "unpack", unit="tables") as bar:
            for table in kept:
                for row, record in enumerate(_records(table.location, [table.image_column])):
                    image = _bytes_of(record[table.image_column], f"row {row} of {table.location}")
                    content.update(image)
                    self._spool.write(image)
                    sizes.append(len(image))
                    self._rows.append((table.name, row))
                bar.update(1)
        self._ends = np.cumsum([0, *sizes], dtype=np.int64)
        naming = f" {self.class_names}" if config.label_names else ""
        self.digest = storage.digest(f"{content.hexdigest()} {sizes} {self.labels.tolist()}{naming}".encode())
        self._describe("parquet tables", settled.words)
        self._settle_shape()

    def encoded(self, number: int) -> bytes:
        """The bytes in the table."""
        return storage.read_range(self._spool.path, int(self._ends[number]), int(self._ends[number + 1]))

    def origin(self, number: int) -> str:
        """Table and row."""
        name, row = self._rows[number]
        return f"{name}/{row}"


def _tables(path: str) -> tuple[list[tuple[str, str]], Counter[str]]:
    """Names and locations of the tables, and the other files by kind."""
    if not storage.exists(path):
        raise DataError(f"there is no {path}; check source.path")
    if not storage.is_folder(path):
        return [(storage.base_name(path), path)], Counter()
    files = [file.name for file in storage.walk(path)]
    names = [name for name in files if name.lower().endswith(".parquet") and junk_kind(name) is None]
    if not names:
        raise DataError(f"no .parquet in {path}; check source.path")
    return [(name, storage.join(path, name)) for name in names], Counter(map(kind_of, set(files).difference(names)))


def _read_table(name: str, location: str, role: splits.Role | None, config: SourceConfig, split: SplitConfig) -> _Table:
    """The columns of a table, and its labels; no image is read."""
    table = _open(location)
    image_column, label_column = _columns(table, config, location)
    labels: list[int | str | None] = [None] * table.metadata.num_rows
    if label_column is not None:
        cells = [record[label_column] for record in _records(location, [label_column])]
        labels = [as_label(cell, f"row {row} of {location}") for row, cell in enumerate(cells)]
    columns = table.schema_arrow.names
    for column in columns if split.by_name else ():
        if column.lower() in splits.SPLIT_COLUMNS and column != label_column:
            splits.refuse_split_column(column, (record[column] for record in _records(location, [column])), location)
    other_columns = tuple(column for column in columns if column not in (image_column, label_column))
    class_names = _class_names(table, label_column)
    return _Table(name, location, role, image_column, label_column, other_columns, labels, class_names)


def _columns_used(table: _Table) -> str:
    """Which columns of a table are used, in words."""
    others = f" (other columns: {', '.join(table.other_columns[:10])})" if table.other_columns else ""
    if table.label_column is not None:
        return f"labels: column {table.label_column}{others}"
    return f"no labels{others}; name the column that holds them with source.label_column" if others else "no labels"


def _file_of(table: _Table) -> SourceFile:
    unlabelled = table.labels.count(None)
    first = f"row {table.labels.index(None)} of {table.location}" if unlabelled else ""
    return SourceFile(table.name, table.role, len(table.labels), len(table.labels) - unlabelled, first)


def _labels_of(tables: Sequence[_Table], config: SourceConfig, path: str) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Class names and numbers of all rows, of tables that name their classes alike."""
    first = tables[0]
    other = next((table for table in tables if table.class_names != first.class_names), None)
    if other is not None:
        raise DataError(
            f"tables must name the same classes in one order (got {_shown(first)} in {first.name}, {_shown(other)} in "
            f"{other.name}); pack them as sources of their own, or convert one"
        )
    labels = [label for table in tables for label in table.labels]
    if first.class_names and config.label_names is None and all(isinstance(label, int) for label in labels):
        return first.class_names, np.array(labels, dtype=np.int64)
    return classes_of_labels(labels, config.label_names, path)


def _shown(table: _Table) -> str:
    names = table.class_names
    return ", ".join(names[:3]) + (f" .. ({len(names)})" if len(names) > 3 else "") if names else "none"


def _records(location: str, columns: list[str]) -> Iterator[dict[str, Any]]:
    import pyarrow as arrow

    try:
        for batch in _open(location).iter_batches(batch_size=_ROWS, columns=columns):
            yield from batch.to_pylist()
    except (arrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{location} is damaged ({reason}); download it again") from error


def _open(location: str) -> Any:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise DataError(needs_package("source.kind=parquet", "pyarrow", "parquet")) from error
    try:
        return parquet.ParquetFile(storage.open_seekable(location))
    except (arrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{location} is not a parquet table ({reason}); download it again") from error


def _columns(table: Any, config: SourceConfig, location: str) -> tuple[str, str | None]:
    """The column of images, and that of labels if there is one."""
    names = table.schema_arrow.names
    for setting, asked in (("image_member", config.image_member), ("label_column", config.label_column)):
        if asked is not None and asked not in names:
            raise DataError(f"source.{setting} must be a column (got {asked}; {location} has {', '.join(names)})")
    images = [name for name in names if _holds_images(table, name)]
    usual = [name for name in _IMAGE_COLUMNS if name in images]
    if config.image_member is None and len(images) > 1:
        raise DataError(
            f"one column must hold the images (got {', '.join(images)} in {location}); name it with source.image_member"
        )
    image = config.image_member or next(iter(usual or images), None)
    if image is None:
        raise DataError(
            f"{location} must have a column of images, struct<bytes, path> or binary (got {', '.join(names)}); name it "
            f"with source.image_member"
        )
    by_lower = {name.lower(): name for name in names}
    labels = [by_lower[name] for name in _LABEL_COLUMNS if name in by_lower]
    return image, config.label_column or next(iter(labels), None)


def _holds_images(table: Any, column: str) -> bool:
    """Whether a column has the type of images."""
    import pyarrow as arrow

    kind = table.schema_arrow.field(column).type
    if arrow.types.is_struct(kind):
        return any(kind.field(number).name == "bytes" for number in range(kind.num_fields))
    return arrow.types.is_binary(kind) or arrow.types.is_large_binary(kind)


def _class_names(table: Any, label_column: str | None) -> tuple[str, ...]:
    """Names of a ClassLabel feature, from the metadata that Hugging Face's datasets writes."""
    metadata = (table.schema_arrow.metadata or {}).get(b"huggingface")
    if metadata is None or label_column is None:
        return ()
    try:
        return tuple(json.loads(metadata)["info"]["features"][label_column]["names"])
    except (ValueError, KeyError, TypeError):
        return ()


def _bytes_of(value: Any, origin: str) -> bytes:
    content = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(content, bytes):
        raise DataError(f"{origin} must hold image bytes (got {type(content).__name__}); embed the images in the table")
    return content
