"""Random tars and tables are read with the splits and labels that were planted, or the difference is reported."""

import io
import json
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from tarflow_scale.config.prepare import SourceConfig, SplitConfig
from tarflow_scale.errors import DataError
from tarflow_scale.shards.images import encode_png
from tarflow_scale.shards.sources import open_source
from tarflow_scale.shards.sources.splits import PACKED

NAMES = {
    "train": ("train", "Training", "trn"),
    "validation": ("val", "VALID", "validation", "dev"),
    "test": ("test", "Testing"),
    "other": ("extra", "unlabeled"),
}
PATTERNS = ("{split}-{n:05d}-of-00002", "data-{split}-{n:06d}", "{split}/{n:04d}", "default/{split}/{n}", "{split}{n}")
Sample = tuple[str, int, int | str | None]
"""A file, the position of a sample in it, and the label."""


@st.composite
def planted(draw: st.DrawFn) -> dict[str, tuple[str, list[int | str | None]]]:
    """Split and labels of every file, by its name without the extension."""
    roles = draw(st.sampled_from([("train",), ("train", "test"), ("train", "validation"), tuple(NAMES)]))
    pattern = draw(st.sampled_from(PATTERNS))
    classes = draw(st.sampled_from([None, (0, 1, 2), ("cat", "dog", "red fox")]))
    files: dict[str, tuple[str, list[int | str | None]]] = {}
    for role in roles:
        split = draw(st.sampled_from(NAMES[role]))
        unlabelled = classes is None or (role == "test" and draw(st.booleans()))
        for number in range(draw(st.integers(1, 2))):
            size = draw(st.integers(1, 4))
            labels = [None] * size if unlabelled else [draw(st.sampled_from(classes or ())) for _ in range(size)]
            files[pattern.format(split=split, n=number)] = (role, labels)
    if draw(st.integers(0, 9)) == 0:
        files["leftover"] = ("nothing", [classes[0] if classes else None])
    return files


def picture(number: int) -> bytes:
    return encode_png(np.full((3, 4, 4), number % 256, np.uint8))


def write_tar(path: Path, labels: list[int | str | None]) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for number, label in enumerate(labels):
            members = {f"._{number}.png": b"x", f"{number}.png": picture(number)}
            members |= {} if label is None else {f"{number}.cls": f"{label}\r\n".encode()}
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                info.size, info.pax_headers = len(content), {"mtime": f"{number}.5"}
                tar.addfile(info, io.BytesIO(content))


def write_table(path: Path, labels: list[int | str | None]) -> None:
    columns: dict[str, Any] = {"image": [{"bytes": picture(n), "path": None} for n in range(len(labels))]}
    if any(isinstance(label, str) for label in labels):
        columns["label"] = labels
    else:
        columns["label"] = [-1 if label is None else label for label in labels]
    parquet.write_table(pyarrow.table(columns), path)


@pytest.mark.parametrize(
    ("kind", "end", "write"), [("webdataset", ".tar", write_tar), ("parquet", ".parquet", write_table)]
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=planted())
def test_tars_and_tables_have_the_splits_and_labels_that_were_planted(
    case: dict[str, tuple[str, list[int | str | None]]],
    kind: str,
    end: str,
    write: Callable[[Path, list[int | str | None]], None],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, (_, labels) in case.items():
            path = Path(folder, f"{name}{end}")
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path, labels)
        config = SourceConfig.model_validate({"kind": kind, "path": folder})
        if "leftover" in case:
            with pytest.raises(DataError, match=r"must belong to a split.*split\.ignore"):
                open_source(config, SplitConfig())
            return
        source = open_source(config, SplitConfig())
        roles = {role for role, _ in case.values()}
        kept: set[str] = set()
        for number in range(len(source)):
            file, _, place = source.origin(number).rpartition(":" if kind == "webdataset" else "/")
            role, labels = case[file.removesuffix(end)]
            kept.add(role)
            label = source.class_names[source.labels[number]] if source.class_names else None
            planted_label = labels[int(place)]
            assert label == (None if planted_label is None else str(planted_label))
            assert source.image(number)[0, 0, 0] == int(place) % 256
            if source.official is not None:
                assert (PACKED[source.official[number]] == "train") == (role == "train")
        assert "train" in kept
        held_out = kept - {"train"}
        assert (source.official is None) == (not held_out)
        assert len(held_out) <= 1
        for role in roles - kept:
            assert any(line.startswith("left out:") and f"({role} split" in line for line in source.lines), json.dumps(
                source.lines
            )
        whole = sum(len(labels) for role, labels in case.values() if role in kept)
        assert len(source) == whole
