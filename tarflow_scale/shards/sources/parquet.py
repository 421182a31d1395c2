"""Parquet tables with image bytes, as Hugging Face data sets are stored.

A column holds images as ``struct<bytes, path>`` or as binary, another an integer label; names of classes are in the
schema's metadata. Rows of Parquet lie compressed in groups and cannot be read one by one, so the image bytes are
copied into one temporary file first (in ``TMPDIR``, as large as the images, gone when the process ends).
"""

import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from tarflow_scale import storage, telemetry
from tarflow_scale.errors import DataError
from tarflow_scale.shards.sources.base import EncodedSource, Shaping, Spool, as_label, numbered_classes, split_layout

__all__ = ["ParquetSource"]

_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label", "labels", "fine_label")
_ROWS = 256
_SPLITS = ("train", "test", "validation", "valid", "val")


class ParquetSource(EncodedSource):
    """Rows of one ``.parquet`` file, or of all below a folder (or URL).

    Files named ``train-*`` and ``test-*`` or ``validation-*``, or in folders of these names, make an official split;
    test goes before validation.

    Args:
        path: the file or folder.
        shaping: what is done to sizes.

    Raises:
        DataError: no pyarrow, no tables, or no column of images.
    """

    def __init__(self, path: str, shaping: Shaping) -> None:
        files = _tables(path)
        layout = split_layout([_split_of(name) for name, _ in files])
        kept = range(len(files)) if layout is None else layout.kept
        tests = np.zeros(len(files), dtype=np.bool_) if layout is None else layout.test
        self._spool = Spool()
        self._rows: list[tuple[str, int]] = []
        sizes: list[int] = []
        labels: list[int] = []
        in_test: list[bool] = []
        labelled: set[bool] = set()
        class_names: tuple[str, ...] = ()
        content = hashlib.sha256()
        with telemetry.progress_bar(len(kept), "unpack", unit="tables") as bar:
            for number, test in zip(kept, tests, strict=True):
                name, location = files[number]
                table = _open(location)
                image_column, label_column = _columns(table, location)
                labelled.add(label_column is not None)
                if len(labelled) > 1:
                    raise DataError(f"all tables must have labels, or none (got both, the second in {location})")
                class_names = class_names or _class_names(table, label_column)
                columns = [image_column] + ([label_column] if label_column else [])
                for row, record in enumerate(_records(table, columns, location)):
                    what = f"row {row} of {location}"
                    image = _bytes_of(record[image_column], what)
                    content.update(image)
                    self._spool.write(image)
                    sizes.append(len(image))
                    labels.append(as_label(record[label_column], what) if label_column else 0)
                    in_test.append(bool(test))
                    self._rows.append((name, row))
                bar.update(1)
        self._spool.flush()
        self._ends = np.cumsum([0, *sizes], dtype=np.int64)
        if not class_names and any(labels):
            class_names = numbered_classes(np.array(labels))
        super().__init__(
            shaping,
            name=storage.base_name(path).removesuffix(".parquet"),
            description=f"parquet tables, {layout.words}" if layout else "parquet tables",
            class_names=class_names,
            labels=np.array(labels, dtype=np.int64),
            digest=storage.digest(f"{content.hexdigest()} {sizes} {labels}".encode()),
            official_test=np.array(in_test) if layout else None,
        )

    def encoded(self, number: int) -> bytes:
        """The bytes in the table."""
        return storage.read_range(self._spool.path, int(self._ends[number]), int(self._ends[number + 1]))

    def origin(self, number: int) -> str:
        """Table and row."""
        name, row = self._rows[number]
        return f"{name}/{row}"


def _tables(path: str) -> list[tuple[str, str]]:
    if not storage.exists(path):
        raise DataError(f"there is no {path}; check source.path")
    if not storage.is_folder(path):
        return [(storage.base_name(path), path)]
    names = [file.name for file in storage.walk(path) if file.name.endswith(".parquet")]
    if not names:
        raise DataError(f"no .parquet in {path}; check source.path")
    return [(name, storage.join(path, name)) for name in names]


def _split_of(name: str) -> str | None:
    """``train`` for ``train-00000-of-00002.parquet`` and for ``default/train/0000.parquet``."""
    words = [re.split(r"[-_.]", part, maxsplit=1)[0] for part in reversed(name.split("/"))]
    return next((word for word in words if word in _SPLITS), None)


def _records(table: Any, columns: list[str], location: str) -> Iterator[dict[str, Any]]:
    import pyarrow as arrow

    try:
        for batch in table.iter_batches(batch_size=_ROWS, columns=columns):
            yield from batch.to_pylist()
    except (arrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{location} is damaged ({reason}); download it again") from error


def _open(location: str) -> Any:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise DataError("source.kind=parquet needs pyarrow (got none); pip install 'tarflow-scale[parquet]'") from error
    try:
        return parquet.ParquetFile(storage.open_seekable(location))
    except (arrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{location} is not a parquet table ({reason}); download it again") from error


def _columns(table: Any, location: str) -> tuple[str, str | None]:
    names = table.schema_arrow.names
    image = next((name for name in _IMAGE_COLUMNS if name in names), None)
    if image is None:
        raise DataError(
            f"{location} must have a column {' or '.join(_IMAGE_COLUMNS)} (got {', '.join(names)}); rename it"
        )
    return image, next((name for name in _LABEL_COLUMNS if name in names), None)


def _class_names(table: Any, label_column: str | None) -> tuple[str, ...]:
    """Names of a ClassLabel feature, from the metadata that Hugging Face's datasets writes."""
    metadata = (table.schema_arrow.metadata or {}).get(b"huggingface")
    if metadata is None or label_column is None:
        return ()
    try:
        return tuple(json.loads(metadata)["info"]["features"][label_column]["names"])
    except (ValueError, KeyError, TypeError):
        return ()


def _bytes_of(value: Any, what: str) -> bytes:
    content = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(content, bytes):
        raise DataError(f"{what} must hold image bytes (got {type(content).__name__}); embed the images in the table")
    return content
