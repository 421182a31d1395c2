"""Tables of numbers: npz and CSV give the same vectors, and messages name the position of each mistake."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tarflow_scale.config.prepare import SourceConfig
from tarflow_scale.errors import DataError
from tarflow_scale.shards.sources import open_source
from tarflow_scale.shards.sources.vector_files import VectorSource


def numbers_of(source: VectorSource) -> tuple[np.ndarray, np.ndarray]:
    return source.event.unpack(np.stack([source.image(number) for number in range(len(source))]))


def test_csv_and_npz_give_the_same(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x, given = rng.standard_normal((7, 2)).astype("f4"), rng.standard_normal((7, 1)).astype("f4")
    labels = np.arange(7) % 3
    np.savez(tmp_path / "a.npz", x=x, conditions=given, labels=labels)
    rows = [f"{p[0]!s},{k},{p[1]!s},{c[0]!s}" for p, c, k in zip(x, given, labels, strict=True)]
    (tmp_path / "a.csv").write_text("left,kind,right,t\n" + "\n".join(rows) + "\n")
    ours = VectorSource(str(tmp_path / "a.npz"))
    theirs = VectorSource(str(tmp_path / "a.csv"), "kind", ("t",))
    for ours_part, theirs_part in zip(numbers_of(ours), numbers_of(theirs), strict=True):
        assert np.allclose(ours_part, theirs_part, atol=1e-6)
    assert numbers_of(ours)[0].tobytes() == x.tobytes()
    assert (ours.labels == theirs.labels).all()
    assert ours.class_names == theirs.class_names == ("0", "1", "2")


def test_names_of_classes_and_an_official_split(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("v,kind\n1,wine\n2,beer\n3,wine\n")
    source = VectorSource(str(tmp_path / "a.csv"), "kind")
    assert source.class_names == ("beer", "wine")
    assert source.labels.tolist() == [1, 0, 1]
    np.savez(tmp_path / "b.npz", x=np.zeros((4, 2)), x_test=np.ones((2, 2)))
    split = VectorSource(str(tmp_path / "b.npz"))
    assert split.official is not None
    assert split.official.tolist() == [0] * 4 + [2] * 2


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"y": np.zeros(3)}, "must hold the array x"),
        ({"x": np.zeros(3)}, r"an array of numbers \(N, columns\)"),
        ({"x": np.zeros((3, 0))}, "must have at least one column"),
        ({"x": np.full((3, 2), np.inf)}, "in sample 0"),
        ({"x": np.full((3, 2), 1e300)}, "in sample 0"),
        ({"x": np.zeros((3, 2)), "labels": np.zeros(2, int)}, "3 whole numbers of"),
        ({"x": np.zeros((3, 2)), "labels": np.full(3, -1)}, "at least 0"),
        ({"x": np.zeros((3, 2)), "conditions": np.zeros(3)}, "conditions of"),
        ({"x": np.zeros((3, 2)), "x_test": np.zeros((3, 1))}, "same arrays and columns"),
        ({"x": np.zeros((3, 2)), "labels_test": np.zeros(3, int)}, "same arrays and columns"),
        ({"x": np.array([[{}]], dtype=object)}, "cannot be read"),
        ({"x": np.zeros((0, 2))}, "no images|check source.path"),
    ],
)
def test_mistakes_in_an_npz(tmp_path: Path, arrays: dict[str, Any], reason: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=reason):
        open_source(SourceConfig(kind="vectors", path=str(tmp_path / "a.npz")))


@pytest.mark.parametrize(
    ("text", "label", "given", "reason"),
    [
        ("a,b\n", None, (), "a row for each sample"),
        ("1,2\n3,4\n", None, (), "must have a header"),
        ("a,b\n1,\n", "b", (), "none in line 2"),
        ("a,b\n1,x\n", None, (), "'x' in line 2, column b"),
        ("a,b\n1,2\n1\n", None, (), "got 1 in line 3"),
        ("a,b\n1,nan\n", None, (), "finite"),
        ("a,a\n1,2\n", None, (), "each column once"),
        ("a,b\n1,2\n", "c", (), "each column once"),
        ("a,b\n1,2\n", "a", ("a",), "each column once"),
        ("a,b\n1,2\n", None, ("a", "b"), "a column of values"),
        ('a,b\n"1,2\n', None, (), "is not a CSV"),
        ("a;b\n1;2\n", None, (), "separated by commas .got ';'.; save it with commas"),
        ("a\tb\n1\t2\n", None, (), "separated by commas"),
        (",a,b\n0,1,2\n", None, (), "pandas writes its index as a column without a name.; save it with index=False"),
        ("Unnamed: 0,a\n0,1\n", None, (), "save it with index=False"),
        ("a,b\n1,0\n2,-1\n", "b", (), "must not be -1 .got -1 in line 3"),
        ("a,b\n1,0\n2,cat\n", "b", (), "all numbers or all text"),
    ],
)
def test_mistakes_in_a_csv(tmp_path: Path, text: str, label: str | None, given: tuple[str, ...], reason: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(DataError, match=reason):
        VectorSource(str(tmp_path / "a.csv"), label, given)


def test_other_files_and_settings_of_the_other_format(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("1 2")
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 damaged")
    with pytest.raises(DataError, match=r"\.npz or \.csv"):
        VectorSource(str(tmp_path / "a.txt"))
    with pytest.raises(DataError, match="cannot be read"):
        VectorSource(str(tmp_path / "a.npz"))
    with pytest.raises(DataError, match="work only for CSV files"):
        VectorSource(str(tmp_path / "a.npz"), "kind")
