"""Parquet tables with image bytes, the format of Hugging Face data sets.

One column contains the images, as ``struct<bytes, path>`` or as binary. Another column contains the labels: numbers or
text, plain or dictionary-encoded. The metadata of the schema may give class names. Parquet compresses rows in groups,
so single rows cannot be read. Therefore, the images of the splits that are packed are first copied to a temporary file.
This file is in ``TMPDIR``, is as large as the images, and is deleted when the process ends.
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
from tarflow_scale.shards.sources.junk import sort_files
from tarflow_scale.shards.sources.source import EncodedSource
from tarflow_scale.shards.sources.split_choice import SourceFile, settle_files
from tarflow_scale.shards.sources.spool import Spool

__all__ = ["ParquetSource"]

_IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp", "picture", "photo", "pixel_values")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "cls", "class")
_ROWS = 256


@dataclass(frozen=True)
class _Table:
    """A table: its path or URL, its split, the label of every row, and a line that says which columns are used."""

    location: str
    file: SourceFile
    image_column: str
    labels: list[int | str | None]
    class_names: tuple[str, ...]
    line: str


class ParquetSource(EncodedSource):
    """Rows of one ``.parquet`` file, or of all ``.parquet`` files below a folder (or URL).

    Raises:
        DataError: pyarrow is not installed; there are no tables; the column of images is missing or ambiguous; or the
            tables name their classes differently.
    """

    def __init__(self, config: SourceConfig, split: SplitConfig) -> None:
        super().__init__(config)
        path = config.path or ""
        locations, self.ignored = _tables(path)
        roles, _ = splits.roles_of_files(list(locations), split, "tables", path)
        tables = [_read_table(name, locations[name], role, config, split) for name, role in roles.items()]
        settled = settle_files([table.file for table in tables], split)
        self.lines = (*settled.lines, *dict.fromkeys(table.line for table in tables))
        kept = [table for table in tables if settled.keeps(table.file.role)]
        self.class_names, self.labels = _labels_of(kept, config, path)
        self.official = settled.codes([table.file.role for table in kept for _ in table.labels])
        self.name = storage.base_name(path).removesuffix(".parquet")
        self._spool = Spool()
        self._rows: list[tuple[str, int]] = []
        sizes: list[int] = []
        content = hashlib.sha256()
        with console.ProgressBar(len(kept), "unpack", unit="tables") as bar:
            for table in kept:
                for row, record in enumerate(_records(table.location, [table.image_column])):
                    image = _bytes_of(record[table.image_column], f"row {row} of {table.location}")
                    content.update(image)
                    self._spool.write(image)
                    sizes.append(len(image))
                    self._rows.append((table.file.name, row))
                bar.update(1)
        self._ends = np.cumsum([0, *sizes], dtype=np.int64)
        naming = f" {self.class_names}" if config.label_names else ""
        self.digest = storage.digest(f"{content.hexdigest()} {sizes} {self.labels.tolist()}{naming}".encode())
        self._describe("parquet tables", settled.words)
        self._settle_shape()

    def encoded(self, number: int) -> bytes:
        """The image bytes of row ``number``."""
        return storage.read_range(self._spool.path, int(self._ends[number]), int(self._ends[number + 1]))

    def origin(self, number: int) -> str:
        """Name of the table, and row of image ``number``."""
        name, row = self._rows[number]
        return f"{name}/{row}"


def _tables(path: str) -> tuple[dict[str, str], Counter[str]]:
    """Locations of the tables by name, and the number of other files by kind."""
    if not storage.is_folder(path):
        return {storage.base_name(path): path}, Counter()
    names, ignored = sort_files([file.name for file in storage.walk(path)], (".parquet",))
    if not names:
        raise DataError(f"no .parquet file in {path}; check source.path")
    return {name: storage.join(path, name) for name in names}, ignored


def _read_table(name: str, location: str, role: splits.Role | None, config: SourceConfig, split: SplitConfig) -> _Table:
    """Read the schema and the labels of a table, but no images."""
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
    unused = [column for column in columns if column not in (image_column, label_column)]
    line = f" (other columns: {', '.join(unused[:10])})" if unused else ""
    if label_column is not None:
        line = f"labels: column {label_column}{line}"
    else:
        line = f"no labels{line}{'; set source.label_column to the column of labels' if unused else ''}"
    first = f"row {labels.index(None)} of {location}" if None in labels else ""
    file = SourceFile(name, role, len(labels), len(labels) - labels.count(None), first)
    return _Table(location, file, image_column, labels, _class_names(table, label_column), line)


def _labels_of(tables: Sequence[_Table], config: SourceConfig, path: str) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """The class names of the tables, and the class number of each row.

    Raises:
        DataError: the tables name different classes, or the same classes in different orders.
    """
    names = tables[0].class_names
    different = next((table for table in tables if table.class_names != names), None)
    if different is not None:
        shown = [
            f"{splits.named(table.class_names, 3) or 'none'} in {table.file.name}" for table in (tables[0], different)
        ]
        raise DataError(
            f"tables must name the same classes in the same order (got {', '.join(shown)}); pack them as separate "
            f"sources, or convert one of them"
        )
    labels = [label for table in tables for label in table.labels]
    if names and config.label_names is None and all(isinstance(label, int) for label in labels):
        return names, np.array(labels, dtype=np.int64)
    return classes_of_labels(labels, config.label_names, path)


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
    """The column of images, and the column of labels if there is one."""
    names = table.schema_arrow.names
    for setting, column in (("image_member", config.image_member), ("label_column", config.label_column)):
        if column is not None and column not in names:
            raise DataError(
                f"source.{setting} must be a column of {location} (got {column}, and the columns are "
                f"{', '.join(names)}); correct it"
            )
    images = [name for name in names if _holds_images(table, name)]
    usual = [name for name in _IMAGE_COLUMNS if name in images]
    if config.image_member is None and len(images) > 1:
        raise DataError(
            f"only one column may hold images (got {', '.join(images)} in {location}); choose it with "
            f"source.image_member"
        )
    image = config.image_member or next(iter(usual or images), None)
    if image is None:
        raise DataError(
            f"{location} must have a column of images, struct<bytes, path> or binary (got the columns "
            f"{', '.join(names)}); set source.image_member to the column of images"
        )
    by_lower = {name.lower(): name for name in names}
    labels = [by_lower[name] for name in _LABEL_COLUMNS if name in by_lower]
    return image, config.label_column or next(iter(labels), None)


def _holds_images(table: Any, column: str) -> bool:
    """Whether the type of a column can hold image bytes."""
    import pyarrow as arrow

    kind = table.schema_arrow.field(column).type
    if arrow.types.is_struct(kind):
        return any(kind.field(number).name == "bytes" for number in range(kind.num_fields))
    return arrow.types.is_binary(kind) or arrow.types.is_large_binary(kind)


def _class_names(table: Any, label_column: str | None) -> tuple[str, ...]:
    """Class names of the column of labels, from the metadata that Hugging Face's ``datasets`` writes; else empty."""
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
