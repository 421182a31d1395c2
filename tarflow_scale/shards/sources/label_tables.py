"""Label tables stored beside image files: ``dataset.json``, ``val_annotations.txt``, ``labels.csv`` and others.

A table labels the images below its folder. It refers to an image by its path below that folder, or by its file name
with or without the extension. If ``source.label_table`` is set, only tables that match it are used. Otherwise, tables
are recognized by name: ``dataset.json`` is always used, other tables only if the images have no class folders.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

from tarflow_scale.config.prepare import SourceConfig, SplitConfig
from tarflow_scale.errors import DataError
from tarflow_scale.shards.sources.classes import as_label, parse_json, refuse_mixture, rows_of
from tarflow_scale.shards.sources.splits import refuse_split_column

__all__ = ["LabelTables"]

Label = int | str | None
_USUAL = r"dataset\.json|.*annotations?\.(txt|csv|tsv)|(labels?|metadata|classes)\.(csv|tsv|txt|jsonl)"
_IMAGE_COLUMNS = ("file_name", "filename", "file", "image", "image_id", "image_name", "img", "path", "id", "name")
_LABEL_COLUMNS = ("label", "class", "class_name", "category", "target", "label_id", "class_id", "label_name")


class LabelTables:
    """The label tables of a source.

    Args:
        files: paths of all files of the source.
        read: reads the file at a path.
        config: the settings ``label_table`` and ``label_column``.
        split: its setting ``by_name`` says whether columns that define splits are refused.
        where: path of the source, for messages.

    Attributes:
        lines: lines to be printed: which tables are used, and which are not.
        used: whether the labels of any images come from a table.

    Raises:
        DataError: no file matches ``source.label_table``.
    """

    def __init__(
        self,
        files: Sequence[str],
        read: Callable[[str], bytes],
        config: SourceConfig,
        split: SplitConfig,
        where: str,
    ) -> None:
        self._read, self._config, self._split, self._where = read, config, split, where
        self._pattern = config.label_table
        self._names = [name for name in files if self._may_be_table(name, name.rpartition("/")[2])]
        if self._pattern is not None and not self._names:
            raise DataError(f"source.label_table must be a file below {where} (got {self._pattern}); correct it")
        self._tables: dict[str, dict[str, Label] | None] = {}
        self._matched = False
        self.lines: list[str] = []
        self.used = False

    def _may_be_table(self, path: str, base: str) -> bool:
        if base.startswith("."):
            return False
        if self._pattern is None:
            return re.fullmatch(_USUAL, base.lower()) is not None
        return fnmatchcase(path, self._pattern) or fnmatchcase(base, self._pattern)

    def labels_of(self, paths: Sequence[str], flat: bool) -> list[Label] | None:
        """Labels of the images of a split; None if no table labels them.

        Args:
            paths: paths of the images.
            flat: whether the images have no class folders.

        Raises:
            DataError: a table labels only some of the images, or two tables label them.
        """
        by_table: dict[str, list[Label]] = {}
        for name in self._names:
            if flat or self._pattern is not None or name.endswith("dataset.json"):
                labels = self._labels_by(name, paths)
                if labels is not None:
                    by_table[name] = labels
        if len(by_table) > 1:
            first, second, *_ = by_table
            raise DataError(
                f"only one table may label the images (got {first} and {second} in {self._where}); choose it with "
                f"source.label_table"
            )
        if not by_table:
            return None
        ((name, labels),) = by_table.items()
        unlabelled = labels.count(None)
        if 0 < unlabelled < len(labels):
            raise DataError(
                f"{name} of {self._where} must label every image (got the label -1 for {unlabelled} images); correct it"
            )
        refuse_mixture(labels, f"{name} of {self._where}")
        if not unlabelled:
            self.used = True
            self.lines = [line for line in self.lines if not line.startswith(f"not used: {name},")]
            self._say(f"labels: {name}")
        return labels

    def _labels_by(self, name: str, paths: Sequence[str]) -> list[Label] | None:
        """The labels that a table gives to the images; None if the table does not label them."""
        table = self._table(name)
        folder = name.rpartition("/")[0]
        below = [path for path in paths if not folder or path.startswith(f"{folder}/")]
        if table is None and len(below) == len(paths) and name.endswith("dataset.json"):
            self._say(f"no labels: {name} has none")
            self._matched = True
            return [None for _ in paths]
        if not table or not below:
            return None
        if len(below) < len(paths):
            raise DataError(
                f"{name} must be in a folder that contains all images of {self._where} (got {len(below)} of "
                f"{len(paths)} images in its folder); move it to a higher folder"
            )
        keys = {path: key for path in paths if (key := _key_of(path, folder, table)) is not None}
        if not keys:
            if f"labels: {name}" not in self.lines:
                self._say(f"not used: {name}, which does not name any image of the source")
            return None
        self._matched = True
        missing = [path for path in paths if path not in keys]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise DataError(
                f"{name} of {self._where} must label every image (got no label for {missing[0]}{more}); add the "
                f"labels, or exclude these images with split.ignore"
            )
        double, times = Counter(keys.values()).most_common(1)[0]
        if times > 1:
            raise DataError(
                f"each name in {name} of {self._where} must match one image (got {double}, which matches {times}); "
                f"write paths of images in the table"
            )
        return [table[keys[path]] for path in paths]

    def check(self) -> None:
        """If ``source.label_table`` is set, check that at least one table that matches it names images.

        Raises:
            DataError: no image of the source is in these tables.
        """
        if self._pattern is not None and not self._matched:
            raise DataError(f"{self._names[0]} must name images of {self._where} (got no such name); correct it")

    def _say(self, line: str) -> None:
        if line not in self.lines:
            self.lines.append(line)

    def _table(self, name: str) -> dict[str, Label] | None:
        if name not in self._tables:
            origin, content = f"{name} of {self._where}", self._read(name)
            if name.endswith(".json"):
                self._tables[name] = _of_dataset_json(content, origin)
            else:
                rows = _json_rows(content, origin) if name.endswith(".jsonl") else rows_of(content, origin)
                self._tables[name] = self._of_rows(rows, name, origin) if rows else None
        return self._tables[name]

    def _of_rows(self, rows: list[list[str]], name: str, origin: str) -> dict[str, Label] | None:
        """Labels by image name; None if the table is not used, for example because it has no column of labels."""
        if len(rows[0]) > 2 and all(row[0] == str(number) for number, row in enumerate(rows)):  # an index from pandas
            rows = [row[1:] for row in rows]
        wanted = self._config.label_column
        header = [cell.lower() for cell in rows[0]]
        image = next((header.index(column) for column in _IMAGE_COLUMNS if column in header), None)
        candidates = _LABEL_COLUMNS if wanted is None else (wanted.lower(),)
        label = next((header.index(column) for column in candidates if column in header), None)
        if image is not None and self._split.by_name:
            for column, cell in enumerate(rows[0]):
                refuse_split_column(cell, (row[column] for row in rows[1:] if len(row) > column), origin)
        if image is not None and label is None and wanted is None and len(header) == 2:
            values = [row[1 - image] for row in rows[1:] if len(row) == 2]
            label = 1 - image if 2 * len(set(values)) <= len(values) else None  # else it may hold captions
        columns, usual = ", ".join(rows[0]), " or ".join(_LABEL_COLUMNS[:3])
        if image is not None and label is not None and image != label:
            rows = rows[1:]
        elif wanted is not None:
            raise DataError(
                f"{origin} must have a column of image names and the column {wanted} (got {columns}); correct the "
                f"header or source.label_column"
            )
        elif image is not None and self._pattern is not None:
            raise DataError(
                f"{origin} must have a column named {usual} (got {columns}); set source.label_column to the column of "
                f"labels"
            )
        elif image is not None:
            self._say(
                f"not used: {name}, which has no column named {usual}; set source.label_column to one of {columns}"
            )
            return None
        elif min(map(len, rows)) < 2:
            self._say(f"not used: {name}, which has rows with only one column")
            return None
        else:
            image, label = 0, 1
        return _unique([(row[image], row[label]) for row in rows if len(row) > max(image, label)], origin)


def _of_dataset_json(content: bytes, origin: str) -> dict[str, Label] | None:
    """Labels by path, from ``{"labels": [[path, label], ..]}`` or ``{"labels": {path: label}}``; else None."""
    root = parse_json(content, origin)
    labels = root.get("labels") if isinstance(root, dict) else root
    if labels is None and isinstance(root, dict):
        return None
    pairs = list(labels.items()) if isinstance(labels, dict) else labels
    if not isinstance(pairs, list) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in pairs):
        raise DataError(f"{origin} must hold labels as [[name, label], ...] (got {str(labels)[:60]}); correct it")
    return _unique([(str(path), label) for path, label in pairs], origin)


def _json_rows(content: bytes, origin: str) -> list[list[str]]:
    """Rows of a JSON Lines file; the first row contains the column names."""
    records = [parse_json(line, origin) for line in content.splitlines() if line.strip()]
    if not all(isinstance(record, dict) for record in records):
        raise DataError(f"lines of {origin} must be JSON objects (got {str(records[0])[:60]}); correct it")
    columns = list(dict.fromkeys(key for record in records for key in record))
    values = [[record.get(column) for column in columns] for record in records]
    return [columns, *([value if isinstance(value, str) else json.dumps(value) for value in row] for row in values)]


def _unique(pairs: list[tuple[str, object]], origin: str) -> dict[str, Label]:
    table: dict[str, Label] = {}
    for path, value in pairs:
        label = as_label(value, f"{path} in {origin}")
        if table.setdefault(path.replace("\\", "/").removeprefix("./"), label) != label:
            raise DataError(f"{origin} must give each image one label (got two labels for {path}); correct it")
    return table


def _key_of(path: str, folder: str, table: dict[str, Label]) -> str | None:
    """The name by which a table refers to an image; None if the image is not in the table."""
    below = path.removeprefix(f"{folder}/") if folder else path
    base = path.rpartition("/")[2]
    candidates = (below, path, base, below.rpartition(".")[0], base.rpartition(".")[0])
    return next((key for key in candidates if key in table), None)
