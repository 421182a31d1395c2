"""A hostile index, with a manifest that has its digest, is refused."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tarflow_scale import storage
from tarflow_scale.errors import DataError
from tarflow_scale.shards.reader import ShardSet

Arrays = dict[str, NDArray[Any]]


def without_checksums(arrays: Arrays) -> Arrays:
    return {name: array for name, array in arrays.items() if name != "checksums"}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda a: a | {"offsets": a["offsets"] + 10**12}, "must increase within the .* bytes of its shard"),
        (lambda a: a | {"offsets": a["offsets"] - 512}, r"must increase within .*got -512 to"),
        (lambda a: a | {"offsets": a["offsets"][::-1].copy()}, "must increase within"),
        (lambda a: a | {"offsets": np.zeros_like(a["offsets"])}, "must increase within"),
        (lambda a: a | {"offsets": a["offsets"].astype(float)}, "offsets of .* must be int64 .201,., .*got float64"),
        (lambda a: a | {"offsets": a["offsets"][:, None]}, "offsets of .* must be int64 .201,., .*got int64 .201, 1."),
        (lambda a: a | {"checksums": a["checksums"].astype(str)}, "checksums of .* must be uint64 .200,."),
        (lambda a: a | {"offsets": a["offsets"].astype(object)}, "is not an index .Object arrays cannot be loaded"),
        (without_checksums, "checksums of .* must be uint64 .200,."),
        (lambda a: a | {"algorithm": np.array("md5")}, "must use the checksum 'crc32 of halves' .got 'md5'."),
        (
            lambda a: a | {name: a[name][:-1] for name in ("offsets", "checksums")},
            "because the manifest says 200 samples .got int64 .200,",
        ),
    ],
)
def test_a_hostile_index_is_refused(
    edit: Callable[[Arrays], Arrays], message: str, digits: Path, tmp_path: Path
) -> None:
    shutil.copytree(digits / "test", tmp_path / "test")
    buffer, path = io.BytesIO(), tmp_path / "test"
    with np.load(path / "test-00000.index.npz") as arrays:
        np.savez(buffer, **edit(dict(arrays)))  # type: ignore[arg-type]
    replace_index(path, buffer.getvalue())
    with pytest.raises(DataError, match=message):
        ShardSet(str(path), verify="full")
    with pytest.raises(DataError, match=message):
        ShardSet(str(path)).take(np.arange(2))


@pytest.mark.parametrize("content", [b"", b"PK no zip", b"\x80\x04N.", b"\x93NUMPY\x01\x00"])
def test_what_is_no_index_is_refused(content: bytes, digits: Path, tmp_path: Path) -> None:
    shutil.copytree(digits / "test", tmp_path / "test")
    replace_index(tmp_path / "test", content)
    with pytest.raises(DataError, match="test-00000.index.npz is not an index"):
        ShardSet(f"{tmp_path}/test", verify="full")


def replace_index(path: Path, content: bytes) -> None:
    (path / "test-00000.index.npz").write_bytes(content)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["shards"] = manifest["shards"][:1]
    manifest["shards"][0]["index_sha256"] = storage.digest(content)
    (path / "manifest.json").write_text(json.dumps(manifest))
