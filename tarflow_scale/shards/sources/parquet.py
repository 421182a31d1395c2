"""Parquet tables with image bytes, as Hugging Face data sets are stored.

A column holds images as ``struct<bytes, path>`` or as binary, another an integer label; names of classes are in the
schema's metadata. Rows of Parquet lie compressed in groups and cannot be read one by one, so the image bytes are
copied into one temporary file first (in ``TMPDIR``, as large as the images).
"""

import itertools
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tarflow_scale import storage
from tarflow_scale.errors import DataError
from tarflow_scale.shards.sources.base import EncodedSource, Shaping

__all__ = ["ParquetSource"]

_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label", "labels", "fine_label")
_ROWS = 256
_TEST_SPLITS = ("test", "validation", "val")


class ParquetSource(EncodedSource):
    """Rows of one ``.parquet`` file, or of all below a folder (or URL).

    Files named ``train-*`` and ``test-*`` or ``validation-*`` make an official split; test goes before validation.

    Args:
        path: the file or folder.
        shaping: what is done to sizes.

    Raises:
        DataError: no pyarrow, no tables, or no column of images.
    """

    def __init__(self, path: str, shaping: Shaping) -> None:
        files = _tables(path)
        self._scratch = tempfile.TemporaryDirectory(prefix="tarflow-scale-")
        self._spool = Path(self._scratch.name) / "images"
        ends: list[int] = []
        labels: list[int] = []
        tests: list[bool] = []
        labelled: set[bool] = set()
        self._rows: list[tuple[str, int]] = []
        class_names: tuple[str, ...] = ()
        chosen = _official(files)
        with self._spool.open("wb") as spool:
            for name, location in files:
                split = _split_of(name)
                if chosen is not None and split not in ("train", chosen):
                    continue
                table = _open(location)
                image_column, label_column = _columns(table, location)
                labelled.add(label_column is not None)
                if len(labelled) > 1:
                    raise DataError(f"all tables must have labels, or none (got both, the second in {location})")
                class_names = class_names or _class_names(table, label_column)
                columns = [image_column] + ([label_column] if label_column else [])
                row = itertools.count()
                for batch in table.iter_batches(batch_size=_ROWS, columns=columns):
                    for record in batch.to_pylist():
                        number = next(row)
                        spool.write(_bytes_of(record[image_column], f"row {number} of {location}"))
                        ends.append(spool.tell())
                        labels.append(int(record[label_column]) if label_column else 0)
                        tests.append(split == chosen)
                        self._rows.append((name, number))
        self._ends = np.array([0, *ends], dtype=np.int64)
        if not class_names and any(labels):
            class_names = tuple(str(label) for label in range(max(labels) + 1))
        sizes = "\n".join(f"{name} {storage.size_bytes(location)}" for name, location in files)
        super().__init__(
            shaping,
            name=storage.base_name(path).removesuffix(".parquet"),
            description="parquet tables",
            class_names=class_names,
            labels=np.array(labels, dtype=np.int64),
            digest=storage.digest(f"{sizes} {labels} {np.diff(self._ends).tolist()}".encode()),
            official_test=np.array(tests) if chosen is not None else None,
        )

    def encoded(self, number: int) -> bytes:
        """The bytes in the table."""
        return storage.read_range(str(self._spool), int(self._ends[number]), int(self._ends[number + 1]))

    def origin(self, number: int) -> str:
        """Table and row."""
        name, row = self._rows[number]
        return f"{name}/{row}"

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_scratch"}  # the first process tidies up


def _tables(path: str) -> list[tuple[str, str]]:
    if not storage.exists(path):
        raise DataError(f"there is no {path}; check source.path")
    if not storage.is_folder(path):
        return [(storage.base_name(path), path)]
    names = [name for name, _ in storage.walk(path) if name.endswith(".parquet")]
    if not names:
        raise DataError(f"no .parquet in {path}; check source.path")
    return [(name, storage.join(path, name)) for name in names]


def _split_of(name: str) -> str:
    return re.split(r"[-_./]", name.rsplit("/", 1)[-1], maxsplit=1)[0]


def _official(files: list[tuple[str, str]]) -> str | None:
    """Which files are for testing, where some are for training."""
    splits = {_split_of(name) for name, _ in files}
    return next((split for split in _TEST_SPLITS if split in splits), None) if "train" in splits else None


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
