"""Zips, CIFAR, downsampled ImageNet and Parquet: the images and labels that were written are read again."""

import io
import json
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tarflow_scale.config.prepare import SourceConfig, SplitConfig
from tarflow_scale.errors import DataError
from tarflow_scale.shards.images import decode_image, encode_png
from tarflow_scale.shards.sources import ImageSource, open_source
from tarflow_scale.shards.sources.cifar import restricted_unpickle

RNG = np.random.default_rng(0)


def images(num: int, size: int = 6, channels: int = 3) -> NDArray[np.uint8]:
    return RNG.integers(0, 256, (num, channels, size, size), np.uint8)


def opened(kind: str, path: Path | str, **options: object) -> ImageSource:
    source = open_source(SourceConfig.model_validate({"kind": kind, "path": str(path), **options}))
    clone = pickle.loads(pickle.dumps(source))  # as a worker process gets it
    assert all(np.array_equal(clone.image(i), source.image(i)) for i in range(len(source)))
    assert [clone.origin(i) for i in range(len(source))] == [source.origin(i) for i in range(len(source))]
    return source


# --- zip


def write_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_a_zip_takes_its_labels_from_dataset_json(tmp_path: Path) -> None:
    some = images(3)
    names = [f"00000/img{i:08d}.png" for i in range(3)]
    members = {name: encode_png(image) for name, image in zip(names, some, strict=True)}
    labels = json.dumps({"labels": [[names[2], 4], [names[0], 1], [names[1], 0]]}).encode()
    source = opened("zip", write_zip(tmp_path / "edm.zip", members | {"dataset.json": labels}))
    assert source.labels.tolist() == [1, 0, 4]
    assert source.class_names == ("0", "1", "2", "3", "4")
    assert all(np.array_equal(source.image(i), some[i]) for i in range(3))
    without = json.dumps({"labels": None}).encode()
    source = opened("zip", write_zip(tmp_path / "flat.zip", members | {"dataset.json": without}))
    assert source.class_names == ()


def test_a_zip_without_dataset_json_takes_its_folders(tmp_path: Path) -> None:
    members = {f"{name}/{i}.png": encode_png(images(1)[0]) for name in ("b", "a") for i in range(2)}
    source = opened("zip", write_zip(tmp_path / "x.zip", members | {"__MACOSX/._a.png": b"", "a/readme.txt": b""}))
    assert source.class_names == ("a", "b")
    assert source.labels.tolist() == [0, 0, 1, 1]


def test_zips_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    good = {"a.png": encode_png(images(1)[0]), "b.png": encode_png(images(1)[0])}
    (tmp_path / "no.zip").write_bytes(b"PK no zip")
    cases = {
        "no.zip is not a zip": tmp_path / "no.zip",
        "there is no .*absent.zip": tmp_path / "absent.zip",
        "no images in .*empty.zip": write_zip(tmp_path / "empty.zip", {"a.txt": b""}),
        r"must label every image \(got no label for b.png\)": write_zip(
            tmp_path / "half.zip", good | {"dataset.json": b'{"labels": [["a.png", 0]]}'}
        ),
        r"must hold labels as \[\[name, label\]": write_zip(
            tmp_path / "odd.zip", good | {"dataset.json": b'{"labels": 7}'}
        ),
        **{
            message: write_zip(
                tmp_path / f"{word}.zip",
                good | {"dataset.json": f'{{"labels": [["a.png", {word}], ["b.png", 0]]}}'.encode()},
            )
            for word, message in {
                "-1": r"must label every image \(got the label -1 for 1 images\)",
                "1.5": r"a label must be one whole number or text \(got '1.5' for a.png",
                "100000000000": r"a label must be a whole number from 0 to 1048576 \(got 100000000000 for a.png",
                "9" * 30: r"a label must be a whole number from 0 to 1048576 \(got 9{30} for a.png",
            }.items()
        },
    }
    for message, path in cases.items():
        with pytest.raises(DataError, match=message):
            opened("zip", path)


def test_a_zip_member_that_is_too_large_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tarflow_scale.shards.sources.image_files._MAX_MEMBER_BYTES", 10_000)
    path = write_zip(tmp_path / "bomb.zip", {"a.png": bytes(20_000)})
    with pytest.raises(DataError, match=r"bomb.zip:a.png is too large for an image \(20,000 bytes\)"):
        opened("zip", path)


# --- CIFAR


def cifar_rows(num: int) -> tuple[NDArray[np.uint8], list[int]]:
    return RNG.integers(0, 256, (num, 3072), np.uint8), [int(label) for label in RNG.integers(0, 10, num)]


def write_cifar10(path: Path, binary: bool, num: int = 4) -> tuple[NDArray[np.uint8], list[int]]:
    """Write five training batches and a test batch in the published form; returns all rows and labels in that order."""
    path.mkdir()
    rows, labels = [], []
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    words = ["airplane", *(f"c{i}" for i in range(1, 10))]
    for name in names:
        data, given = cifar_rows(num)
        rows.append(data)
        labels += given
        if binary:
            content = np.concatenate([np.array(given, np.uint8)[:, None], data], axis=1).tobytes()
            (path / f"{name}.bin").write_bytes(content)
        else:
            batch = {b"data": data, b"labels": given, b"batch_label": b"x", b"filenames": [b"f.png"] * num}
            (path / name).write_bytes(pickle.dumps(batch, protocol=2))
    if binary:
        (path / "batches.meta.txt").write_text("\n".join(words))
    else:
        (path / "batches.meta").write_bytes(pickle.dumps({b"label_names": [w.encode() for w in words]}, protocol=2))
    return np.concatenate(rows), labels


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_cifar_10_in_both_formats(tmp_path: Path, binary: bool, packed: bool) -> None:
    rows, labels = write_cifar10(tmp_path / "batches", binary)
    path = tmp_path / "batches"
    if packed:
        path = tmp_path / "cifar-10.tar.gz"
        with tarfile.open(path, "w:gz") as tar:
            tar.add(tmp_path / "batches", "cifar-10-batches")
    source = opened("cifar", path)
    assert source.labels.tolist() == labels
    assert source.class_names[0] == "airplane"
    assert source.official is not None
    assert source.official.tolist() == [0] * 20 + [2] * 4
    assert all(np.array_equal(source.image(i).reshape(-1), rows[i]) for i in range(24))
    assert (source.origin(19), source.origin(20)) == ("train/19", "test/0")


@pytest.mark.parametrize("binary", [False, True])
def test_cifar_100_has_fine_labels(tmp_path: Path, binary: bool) -> None:
    for name in ("train", "test"):
        data, _ = cifar_rows(3)
        fine, coarse = [99, 5, 7], [3, 3, 3]
        if binary:
            columns = [np.array(coarse, np.uint8)[:, None], np.array(fine, np.uint8)[:, None], data]
            (tmp_path / f"{name}.bin").write_bytes(np.concatenate(columns, axis=1).tobytes())
        else:
            batch = {b"data": data, b"fine_labels": fine, b"coarse_labels": coarse}
            (tmp_path / name).write_bytes(pickle.dumps(batch, protocol=2))
    source = opened("cifar", tmp_path)
    assert source.name == "cifar100"
    assert source.labels.tolist() == [99, 5, 7, 99, 5, 7]
    assert len(source.class_names) == 100


class Evil:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.system, ("touch /tmp/tarflow-scale-was-here",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    write_cifar10(tmp_path / "c", binary=False)
    (tmp_path / "c/data_batch_3").write_bytes(pickle.dumps({b"data": Evil(), b"labels": []}, protocol=2))
    with pytest.raises(DataError, match=r"data_batch_3 is not a pickle of plain arrays \(it refers to posix.system\)"):
        opened("cifar", tmp_path / "c")
    assert not Path("/tmp/tarflow-scale-was-here").exists()
    with pytest.raises(DataError, match="not a pickle of plain arrays"):
        restricted_unpickle(b"\x80\x02}q", "it")
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    assert (restricted_unpickle(pickle.dumps(array, protocol=2), "it") == array).all()


class Pointers:
    """An array of objects whose pickled dtype claims to have no pointers; NumPy would use the bytes as pointers."""

    def __reduce__(self) -> tuple[Any, ...]:
        state = (1, (4,), self.Denial(), False, b"A" * 32)
        return np._core.multiarray._reconstruct, (np.ndarray, (0,), b"b"), state  # type: ignore[attr-defined]

    class Denial:
        def __reduce__(self) -> tuple[Any, ...]:
            return np.dtype, ("O8", False, True), (3, "|", None, None, None, -1, -1, 0)


class Huge:
    def __reduce__(self) -> tuple[Any, ...]:
        return np.ndarray, ((1 << 40,),)


def test_a_pickle_makes_no_array_but_of_the_bytes_that_it_holds() -> None:
    for evil in ({b"data": Pointers()}, {b"labels": [Pointers()]}, Pointers(), np.array([{}], object)):
        with pytest.raises(DataError, match=r"not a pickle of plain arrays \(an array has the type '?O8?'?"):
            restricted_unpickle(pickle.dumps(evil, protocol=2), "it")
    assert restricted_unpickle(pickle.dumps(Huge(), protocol=2), "it").size == 0
    for kind in (">i4", "<f8", "|u1", "=f2"):
        for order in ("C", "F"):
            array = np.asarray(RNG.integers(0, 100, (3, 4)), dtype=kind, order=order)  # type: ignore[call-overload]
            loaded = restricted_unpickle(pickle.dumps({b"data": array}, protocol=2), "it")[b"data"]
            assert (loaded == array).all()
            assert loaded.dtype == array.dtype


def test_an_archive_of_other_sizes_than_cifars_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tarflow_scale.shards.sources.cifar._MAX_ARCHIVE_BYTES", 10_000)
    with tarfile.open(tmp_path / "bomb.tar.gz", "w:gz") as tar:
        for name in ("data_batch_1", "data_batch_2"):
            info = tarfile.TarInfo(name)
            info.size = 6_000
            tar.addfile(info, io.BytesIO(bytes(6_000)))
    with pytest.raises(
        DataError, match=r"only the files of CIFAR, .*\(got 12,000 bytes up to the member 'data_batch_2'\)"
    ):
        opened("cifar", tmp_path / "bomb.tar.gz")


def test_damaged_cifar_batches_are_named(tmp_path: Path) -> None:
    write_cifar10(tmp_path / "a", binary=True)
    (tmp_path / "a/data_batch_2.bin").write_bytes(b"short")
    with pytest.raises(DataError, match=r"data_batch_2.bin must hold rows of 3073 bytes \(got 5 bytes\)"):
        opened("cifar", tmp_path / "a")
    (tmp_path / "a/data_batch_2.bin").write_bytes(bytes([11]) + bytes(3072))
    with pytest.raises(DataError, match=r"labels of data_batch_2.bin must be from 0 to 9 \(got 11\)"):
        opened("cifar", tmp_path / "a")
    (tmp_path / "a/data_batch_2.bin").unlink()
    with pytest.raises(DataError, match="the batch data_batch_2.bin is missing"):
        opened("cifar", tmp_path / "a")
    with pytest.raises(DataError, match="no CIFAR batches in"):
        opened("cifar", tmp_path)


# --- downsampled ImageNet


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_downsampled_imagenet(tmp_path: Path, save: Callable[..., None]) -> None:
    rows = RNG.integers(0, 256, (12, 3 * 8 * 8), np.uint8)
    for number, (low, high) in {1: (0, 4), 2: (4, 6), 10: (6, 9)}.items():
        save(tmp_path / f"train_data_batch_{number}.npz", data=rows[low:high], labels=np.arange(low, high) + 1)
    save(tmp_path / "val_data.npz", data=rows[9:], labels=np.array([1, 2, 3]))
    source = opened("imagenet_npz", tmp_path)
    assert source.name == "imagenet8"
    assert source.labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 2]
    assert source.official is not None
    assert (source.official == 2).sum() == 3
    assert all(np.array_equal(source.image(i).reshape(-1), rows[i]) for i in range(12))
    assert source.origin(6) == "train_data_batch_10.npz/0"
    assert source.lines == ["warning: train_data_batch_3.npz is missing (missing files: 7)"]
    (tmp_path / "val_data.npz").rename(tmp_path / "val_data_1.npz")
    with pytest.raises(DataError, match=r"must be train_data_batch_\*\.npz or val_data\.npz \(got val_data_1\.npz\)"):
        opened("imagenet_npz", tmp_path)
    (tmp_path / "val_data_1.npz").unlink()
    source = opened("imagenet_npz", tmp_path)
    assert source.description == "downsampled ImageNet 8x8"
    assert source.lines[-1].startswith("no val_data.npz: a share (split.test_fraction) of each class is held out")
    (tmp_path / "train_data_batch_2.npz").write_bytes(b"no npz")
    with pytest.raises(DataError, match="train_data_batch_2.npz must hold the arrays data and labels"):
        opened("imagenet_npz", tmp_path)


# --- parquet


def write_parquet(path: Path, some: NDArray[np.uint8], labels: list[int] | None, names: list[str] | None) -> None:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    columns: dict[str, Any] = {
        "image": [{"bytes": encode_png(image), "path": f"{i}.png"} for i, image in enumerate(some)]
    }
    if labels is not None:
        columns["label"] = labels
    table = arrow.table(columns)
    if names is not None:
        features = {"label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path, row_group_size=2)


def test_parquet_in_the_layout_of_hugging_face(tmp_path: Path) -> None:
    some = images(7)
    write_parquet(tmp_path / "data/train-00000-of-00002.parquet", some[:3], [1, 0, 1], ["cat", "dog"])
    write_parquet(tmp_path / "data/train-00001-of-00002.parquet", some[3:5], [0, 0], ["cat", "dog"])
    write_parquet(tmp_path / "data/validation-00000-of-00001.parquet", some[5:], [1, 1], ["cat", "dog"])
    source = opened("parquet", tmp_path)
    assert source.class_names == ("cat", "dog")
    assert source.labels.tolist() == [1, 0, 1, 0, 0, 1, 1]
    assert source.official is not None
    assert source.official.tolist() == [0] * 5 + [2] * 2
    assert all(np.array_equal(source.image(i), some[i]) for i in range(7))
    assert source.origin(4) == "data/train-00001-of-00002.parquet/1"


def test_a_table_that_was_written_again_is_another_source(tmp_path: Path) -> None:
    digests = set()
    for value in (0, 1):
        write_parquet(tmp_path / "a.parquet", np.full((2, 3, 6, 6), value, np.uint8), [0, 1], None)
        digests.add(opened("parquet", tmp_path / "a.parquet").digest)
    assert len(digests) == 2


def test_parquet_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    write_parquet(tmp_path / "one.parquet", images(2), None, None)
    assert opened("parquet", tmp_path / "one.parquet").class_names == ()
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no table")
    with pytest.raises(DataError, match="bad.parquet is not a parquet table"):
        opened("parquet", tmp_path / "bad.parquet")
    for first, second in (("labelled", "bare"), ("bare", "labelled")):
        folder = tmp_path / f"{first}-first"
        for number, kind in enumerate((first, second)):
            write_parquet(folder / f"{number}.parquet", images(2), [1, 0] if kind == "labelled" else None, None)
        bare = int(second == "bare")
        with pytest.raises(
            DataError, match=rf"either all samples or none must have a label .*row 0 of .*{bare}.parquet"
        ):
            opened("parquet", folder)
    parquet.write_table(arrow.table({"text": ["a"]}), tmp_path / "text.parquet")
    with pytest.raises(DataError, match=r"must have a column of images.*\(got the columns text\)"):
        opened("parquet", tmp_path / "text.parquet")
    parquet.write_table(arrow.table({"image": [{"bytes": None, "path": "a.png"}]}), tmp_path / "path.parquet")
    with pytest.raises(DataError, match=r"row 0 of .*path.parquet must hold image bytes \(got NoneType\)"):
        opened("parquet", tmp_path / "path.parquet")


def write_rows(path: Path, labels: object, names: list[str] | None = None, num: int = 4, column: str = "image") -> None:
    """Write a table of images with labels of any Arrow type, and class names in the metadata of Hugging Face."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    files = [{"bytes": encode_png(image), "path": "x.png"} for image in images(num)]
    columns = {column: files} | ({} if labels is None else {"label": labels})
    table = arrow.table(columns)
    if names is not None:
        metadata = {"info": {"features": {"label": {"_type": "ClassLabel", "names": names}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(metadata)})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path)


def test_tables_of_a_third_split_are_left_out_and_reported(tmp_path: Path) -> None:
    for split in ("train", "test", "extra"):
        write_rows(tmp_path / f"{split}-00000-of-00001.parquet", [0, 1, 0, 1], ["zero", "one"])
    source = opened("parquet", tmp_path)
    assert source.official is not None
    assert source.official.tolist() == [2] * 4 + [0] * 4
    assert any(
        line.startswith("left out: extra-00000-of-00001.parquet (other split, 4 images)") for line in source.lines
    )


def test_a_test_table_without_labels_gives_way_to_validation(tmp_path: Path) -> None:
    for split, labels in {"train": [0, 1, 0, 1], "validation": [1, 0, 1, 0], "test": [-1] * 4}.items():
        write_rows(tmp_path / f"data/{split}-00000-of-00001.parquet", labels, ["zero", "one"])
    source = opened("parquet", tmp_path)
    assert {source.origin(i).split("-")[0] for i in np.flatnonzero(source.official == 2)} == {"data/validation"}
    assert any("left out: data/test-" in line and "has no labels" in line for line in source.lines)


def test_tables_that_belong_to_no_split_are_refused_beside_splits(tmp_path: Path) -> None:
    for name in ("train-0", "test-0", "more"):
        write_rows(tmp_path / f"{name}.parquet", [0, 1, 0, 1])
    with pytest.raises(DataError, match=r"got test-0.parquet in a split and more.parquet in none.*split\.ignore"):
        opened("parquet", tmp_path)
    config = SourceConfig(kind="parquet", path=str(tmp_path))
    source = open_source(config, SplitConfig(test=("more*",), ignore=("test-*",)))
    assert {source.origin(i).split("/")[0] for i in np.flatnonzero(source.official == 2)} == {"more.parquet"}
    assert len(source) == 8


def test_labels_of_text_and_dictionaries_become_classes(tmp_path: Path) -> None:
    import pyarrow as arrow

    write_rows(tmp_path / "text.parquet", ["dog", "cat", "dog", "cat"])
    write_rows(tmp_path / "dictionary.parquet", arrow.array(["dog", "cat", "dog", "cat"]).dictionary_encode())
    for name in ("text", "dictionary"):
        source = opened("parquet", tmp_path / f"{name}.parquet")
        assert source.class_names == ("cat", "dog")
        assert source.labels.tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize("labels", [[[0, 1], [1], [0], [1]], [0.0, 1.0, 0.0, 1.0]])
def test_several_labels_or_fractions_are_refused_in_one_line(tmp_path: Path, labels: object) -> None:
    write_rows(tmp_path / "x.parquet", labels)
    with pytest.raises(
        DataError, match=r"a label must be one whole number or text \(got .* for row 0 of .*label_column"
    ):
        opened("parquet", tmp_path / "x.parquet")


def test_tables_that_name_their_classes_differently_are_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "train-0.parquet", [0, 1, 0, 1], ["cat", "dog"])
    write_rows(tmp_path / "test-0.parquet", [0, 1, 0, 1], ["dog", "cat"])
    with pytest.raises(
        DataError, match=r"must name the same classes .*dog, cat in test-0.parquet, cat, dog in train-0"
    ):
        opened("parquet", tmp_path)


def test_the_plan_says_which_column_has_the_labels_and_junk_is_no_table(tmp_path: Path) -> None:
    write_columns(tmp_path / "a/train.PARQUET", Label=["b", "a", "b"], species=["x", "x", "y"])
    (tmp_path / "a/._train.parquet").write_bytes(b"x")
    source = opened("parquet", tmp_path / "a")
    assert source.class_names == ("a", "b")
    assert source.lines[-1] == "labels: column Label (other columns: species)"
    assert source.ignored == {"._*": 1}
    write_columns(tmp_path / "b.parquet", species=["x", "x", "y"])
    assert opened("parquet", tmp_path / "b.parquet").lines == (
        "no labels (other columns: species); set source.label_column to the column of labels",
    )


def test_a_column_of_splits_is_no_pool_of_a_table(tmp_path: Path) -> None:
    write_columns(tmp_path / "x.parquet", label=[0, 1, 0], split=["train", "train", "test"])
    with pytest.raises(DataError, match=r"got the column split in .*x\.parquet\).*split\.by_name=false"):
        opened("parquet", tmp_path / "x.parquet")
    config = SourceConfig(kind="parquet", path=str(tmp_path / "x.parquet"))
    assert len(open_source(config, SplitConfig(by_name=False))) == 3


def test_other_names_of_the_same_classes_make_another_table(tmp_path: Path) -> None:
    write_columns(tmp_path / "x.parquet", label=[0, 1, 0])
    digests = set()
    for name in ("cat", "tomcat"):
        (tmp_path / "names.json").write_text(json.dumps([name, "dog"]))
        digests.add(opened("parquet", tmp_path / "x.parquet", label_names=str(tmp_path / "names.json")).digest)
    assert len(digests) == 2


def write_columns(path: Path, **columns: Any) -> None:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(arrow.table({"image": [encode_png(image) for image in images(3)], **columns}), path)


def test_columns_of_images_and_labels_can_be_named(tmp_path: Path) -> None:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    some = [encode_png(image) for image in images(2)]
    columns = {"photo": some, "mask": some[::-1], "species": ["b", "a"], "label": [0, 0]}
    parquet.write_table(arrow.table(columns), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"got photo, mask in .*source\.image_member"):
        opened("parquet", tmp_path / "x.parquet")
    source = opened("parquet", tmp_path / "x.parquet", image_member="mask", label_column="species")
    assert source.class_names == ("a", "b")
    assert np.array_equal(source.image(1), decode_image(some[0], "x"))
    with pytest.raises(DataError, match=r"source\.label_column must be a column of .*\(got genus"):
        opened("parquet", tmp_path / "x.parquet", image_member="mask", label_column="genus")
