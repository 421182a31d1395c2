"""Tables of labels that lie among image files: ``dataset.json``, ``val_annotations.txt``, ``labels.csv`` and others.

A table labels the images below its folder. It names them by their path below that folder, by their file name, or by
their file name without its end. A table whose name is usual counts where the images have no class folders, and
``dataset.json`` and the one that ``source.label_table`` names count in any case.
"""

import json
import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

from tarflow_scale.config.prepare import SourceConfig, SplitConfig
from tarflow_scale.errors import DataError
from tarflow_scale.shards.sources.classes import as_label, parse_json, refuse_mixture, rows_of
from tarflow_scale.shards.sources.splits import refuse_split_column

__all__ = ["LabelTables"]

_USUAL = r"dataset\.json|.*annotations?\.(txt|csv|tsv)|(labels?|metadata|classes)\.(csv|tsv|txt|jsonl)"
_IMAGE_COLUMNS = ("file_name", "filename", "file", "image", "image_id", "image_name", "img", "path", "id", "name")
_LABEL_COLUMNS = ("label", "class", "class_name", "category", "target", "label_id", "class_id", "label_name")


class LabelTables:
    """The tables of a source.

    Args:
        files: paths of all files of the source.
        read: the content of one of them.
        config: names a table or a column, or neither.
        split: whether names may mean splits.
        where: the source, for messages.

    Attributes:
        lines: which tables were used, and which were not, for the plan.
        used: whether a table gave labels.

    Raises:
        DataError: there is no file of the name that the configuration gives.
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
        self._matched = False
        self._asked = config.label_table is not None
        self.lines: list[str] = []
        self.used = False
        pattern = config.label_table or ""
        self._names = [
            name
            for name in files
            if not name.rpartition("/")[2].startswith(".")
            and (
                (fnmatchcase(name, pattern) or fnmatchcase(name.rpartition("/")[2], pattern))
                if self._asked
                else re.fullmatch(_USUAL, name.rpartition("/")[2].lower())
            )
        ]
        if self._asked and not self._names:
            raise DataError(f"source.label_table must be a file below {where} (got {pattern}); correct it")
        self._tables: dict[str, dict[str, int | str | None] | None] = {}

    def labels_of(self, paths: Sequence[str], flat: bool) -> list[int | str | None] | None:
        """Labels of the images of a split; None if no table labels them.

        Args:
            paths: of the images.
            flat: whether they lie in no class folders.

        Raises:
            DataError: a table labels some of them only, or two tables label them.
        """
        found: list[tuple[str, list[int | str | None]]] = []
        for name in self._names:
            if not flat and not self._asked and not name.endswith("dataset.json"):
                continue
            table = self._table(name)
            folder = name.rpartition("/")[0]
            below = [path for path in paths if not folder or path.startswith(f"{folder}/")]
            if table is None and below == list(paths) and name.endswith("dataset.json"):
                self._say(f"no labels: {name} says so")
                self._matched = True
                found.append((name, [None] * len(paths)))
            if not table:
                continue
            if len(below) < len(paths):
                if below:
                    raise DataError(f"{name} labels {len(below)} of {len(paths)} images of {self._where}; move it up")
                continue
            keys = [_key_of(path, folder, table) for path in paths]
            missing = [path for path, key in zip(paths, keys, strict=True) if key is None]
            if len(missing) == len(paths):
                if f"labels: {name}" not in self.lines:
                    self._say(f"not used: {name}, which names no image here")
                continue
            self._matched = True
            if missing:
                raise DataError(
                    f"{name} of {self._where} must label every image (got none for {missing[0]}"
                    f"{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}); complete it, or leave them out "
                    f"with split.ignore"
                )
            self._refuse_doubles(name, [key for key in keys if key is not None])
            found.append((name, [table[key] for key in keys if key is not None]))
        if len(found) > 1:
            raise DataError(
                f"one table must label an image (got {found[0][0]} and {found[1][0]} in {self._where}); name one with "
                f"source.label_table"
            )
        if not found:
            return None
        name, labels = found[0]
        unlabelled = sum(label is None for label in labels)
        if unlabelled and unlabelled < len(labels):
            raise DataError(f"{name} of {self._where} must label every image (got -1 for {unlabelled}); complete it")
        refuse_mixture(labels, f"{name} of {self._where}")
        if not unlabelled:
            self.used = True
            self.lines = [line for line in self.lines if not line.startswith(f"not used: {name},")]
            self._say(f"labels: {name}")
        return labels

    def check(self) -> None:
        """See that the table of the configuration named some images.

        Raises:
            DataError: it did not.
        """
        if self._asked and not self._matched:
            raise DataError(f"{self._names[0]} of {self._where} must name its images (got none of them); correct it")

    def _say(self, line: str) -> None:
        if line not in self.lines:
            self.lines.append(line)

    def _refuse_doubles(self, name: str, keys: list[str]) -> None:
        if len(set(keys)) < len(keys):
            double = next(key for key in keys if keys.count(key) > 1)
            raise DataError(
                f"{name} of {self._where} must name one image each (got {double}, which several folders hold); name "
                f"images by their paths"
            )

    def _table(self, name: str) -> dict[str, int | str | None] | None:
        if name not in self._tables:
            what = f"{name} of {self._where}"
            content = self._read(name)
            self._tables[name] = (
                _of_dataset_json(content, what)
                if name.endswith(".json")
                else self._of_rows(
                    _json_rows(content, what) if name.endswith(".jsonl") else rows_of(content, what), name
                )
            )
        return self._tables[name]

    def _of_rows(self, rows: list[list[str]], name: str) -> dict[str, int | str | None] | None:
        """Label by image; None if a usual name is that of another table."""
        what, asked = f"{name} of {self._where}", self._config.label_column
        if not rows:
            return None
        if len(rows[0]) > 2 and all(row[0] == str(number) for number, row in enumerate(rows)):  # the index of pandas
            rows = [row[1:] for row in rows]
        header = [cell.lower() for cell in rows[0]]
        image = next((header.index(column) for column in _IMAGE_COLUMNS if column in header), None)
        wanted = _LABEL_COLUMNS if asked is None else (asked.lower(),)
        label = next((header.index(column) for column in wanted if column in header), None)
        if image is not None and self._split.by_name:
            for column, cell in enumerate(rows[0]):
                refuse_split_column(cell, (row[column] for row in rows[1:] if len(row) > column), what)
        if image is not None and label is None and asked is None and len(header) == 2:
            values = [row[1 - image] for row in rows[1:] if len(row) == 2]
            label = 1 - image if 2 * len(set(values)) <= len(values) else None  # texts about images differ
        if image is not None and label is not None and image != label:
            rows = rows[1:]
        elif asked is not None:
            raise DataError(f"{what} must have columns of images and {asked} (got {', '.join(rows[0])}); correct it")
        elif image is not None and self._asked:
            raise DataError(
                f"{what} must have a column {' or '.join(_LABEL_COLUMNS[:3])} (got {', '.join(rows[0])}); name it with "
                f"source.label_column"
            )
        elif image is not None:
            self._say(
                f"not used: {name}, which has no column {' or '.join(_LABEL_COLUMNS[:3])}; name one of "
                f"{', '.join(rows[0])} with source.label_column"
            )
            return None
        elif min(map(len, rows)) < 2:
            self._say(f"not used: {name}, which has rows of one column")
            return None
        else:
            image, label = 0, 1
        return _unique([(row[image], row[label]) for row in rows if len(row) > max(image, label)], what)


def _of_dataset_json(content: bytes, what: str) -> dict[str, int | str | None] | None:
    """``{"labels": [[path, label], ..]}`` or ``{"labels": {path: label}}``; None where it gives no labels."""
    found = parse_json(content, what)
    labels = found.get("labels") if isinstance(found, dict) else found
    if labels is None and isinstance(found, dict):
        return None
    pairs = list(labels.items()) if isinstance(labels, dict) else labels
    if not isinstance(pairs, list) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in pairs):
        raise DataError(f"{what} must hold labels as [[name, label], ...] (got {str(labels)[:60]}); correct it")
    return _unique([(str(path), label) for path, label in pairs], what)


def _json_rows(content: bytes, what: str) -> list[list[str]]:
    """Lines of JSON as rows below a header."""
    records = [parse_json(line, what) for line in content.splitlines() if line.strip()]
    if not all(isinstance(record, dict) for record in records):
        raise DataError(f"lines of {what} must be JSON objects (got {str(records[0])[:60]}); correct it")
    columns = list(dict.fromkeys(key for record in records for key in record))
    cells = [[_cell(record.get(column)) for column in columns] for record in records]
    return [columns, *cells]


def _cell(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _unique(pairs: list[tuple[str, object]], what: str) -> dict[str, int | str | None]:
    table: dict[str, int | str | None] = {}
    for path, value in pairs:
        label = as_label(value, f"{path} in {what}")
        if table.setdefault(path.replace("\\", "/").removeprefix("./"), label) != label:
            raise DataError(f"{what} must label an image once (got {path} twice); correct it")
    return table


def _key_of(path: str, folder: str, table: dict[str, int | str | None]) -> str | None:
    """How a table names an image."""
    below = path.removeprefix(f"{folder}/") if folder else path
    base = path.rpartition("/")[2]
    candidates = (below, path, base, below.rpartition(".")[0], base.rpartition(".")[0])
    return next((key for key in candidates if key in table), None)
