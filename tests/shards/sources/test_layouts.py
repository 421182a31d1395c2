"""Usual layouts of image files give the right splits and classes, or a refusal that names the setting."""

import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tarflow_scale.config.prepare import SourceConfig, SplitConfig
from tarflow_scale.errors import DataError
from tarflow_scale.shards.images import encode_png
from tarflow_scale.shards.sources import ImageSource, open_source
from tarflow_scale.shards.sources.layout import ImageFiles, lay_out
from tarflow_scale.shards.sources.splits import PACKED

PNG = encode_png(np.zeros((3, 4, 4), np.uint8))

Tables = dict[str, str | bytes]


def laid_out(
    names: Sequence[str], tables: Tables | None = None, source: dict[str, Any] | None = None, **split: Any
) -> ImageFiles:
    """The layout of a folder with these images and tables; a name that ends in ``/`` is an empty folder."""
    contents = {name: text.encode() if isinstance(text, str) else text for name, text in (tables or {}).items()}
    config = SourceConfig.model_validate({"kind": "folder", "path": "x", **(source or {})})
    files = sorted([*(name for name in names if not name.endswith("/")), *contents])

    def names_in(folder: str) -> set[str]:
        above = f"{folder}/" if folder else ""
        return {name.removeprefix(above).split("/")[0] for name in (*names, *files) if name.startswith(above)}

    return lay_out(files, contents.__getitem__, names_in, config, SplitConfig.model_validate(split), "x")


def assigned(layout: ImageFiles) -> dict[str, tuple[str | None, str | None]]:
    """Packed split and class of every image; the split is None if there is no official split."""
    return {
        name: (
            None if layout.official is None else PACKED[layout.official[number]],
            layout.class_names[layout.labels[number]] if layout.class_names else None,
        )
        for number, name in enumerate(layout.names)
    }


def spread(folder: str, classes: Sequence[str], num: int = 2, end: str = ".png") -> list[str]:
    return [f"{folder}{name}/{number}{end}" for name in classes for number in range(num)]


def expected(split: str | None, folder: str, classes: Sequence[str], num: int = 2) -> dict[str, Any]:
    return {f"{folder}{name}/{number}.png": (split, name) for name in classes for number in range(num)}


ACCEPTED: dict[str, tuple[list[str], dict[str, Any]]] = {
    "splits in any case, by other usual names": (
        spread("Training/", ("glioma", "notumor")) + spread("Testing/", ("glioma", "notumor")),
        expected("train", "Training/", ("glioma", "notumor")) | expected("test", "Testing/", ("glioma", "notumor")),
    ),
    "splits as a word of a name": (
        spread("seg_train/seg_train/", ("sea", "street")) + spread("seg_test/seg_test/", ("sea", "street")),
        expected("train", "seg_train/seg_train/", ("sea", "street"))
        | expected("test", "seg_test/seg_test/", ("sea", "street")),
    ),
    "numbered splits": (
        spread("train2017/", ("a", "b")) + spread("val2017/", ("a", "b")),
        expected("train", "train2017/", ("a", "b")) | expected("test", "val2017/", ("a", "b")),
    ),
    "one top folder above the classes": (
        spread("flowers/", ("daisy", "rose", "tulip")),
        expected(None, "flowers/", ("daisy", "rose", "tulip")),
    ),
    "two top folders above the splits": (
        spread("my/flowers/train/", ("daisy", "rose")) + spread("my/flowers/test/", ("daisy", "rose")),
        expected("train", "my/flowers/train/", ("daisy", "rose"))
        | expected("test", "my/flowers/test/", ("daisy", "rose")),
    ),
    "a folder of images below each class": (
        [f"train/{c}/images/{i}.png" for c in "ab" for i in range(2)]
        + [f"val/{c}/images/{i}.png" for c in "ab" for i in range(2)],
        {f"train/{c}/images/{i}.png": ("train", c) for c in "ab" for i in range(2)}
        | {f"val/{c}/images/{i}.png": ("test", c) for c in "ab" for i in range(2)},
    ),
    "a split with one class only": (
        [*spread("train/", ("a", "b")), "val/a/images/0.png"],
        expected("train", "train/", ("a", "b")) | {"val/a/images/0.png": ("test", "a")},
    ),
    "splits below the classes": (
        [f"{c}/{s}/{i}.png" for c in ("cat", "dog") for s in ("train", "test") for i in range(2)],
        {f"{c}/{s}/{i}.png": (s, c) for c in ("cat", "dog") for s in ("train", "test") for i in range(2)},
    ),
    "splits by file names": (
        ["train_0.png", "train_1.png", "test_0.png"],
        {"train_0.png": ("train", None), "train_1.png": ("train", None), "test_0.png": ("test", None)},
    ),
    "flat splits": (
        ["train/0.png", "train/1.png", "test/0.png"],
        {"train/0.png": ("train", None), "train/1.png": ("train", None), "test/0.png": ("test", None)},
    ),
    "the images beside nothing": (
        ["images/0.png", "images/1.png"],
        dict.fromkeys(("images/0.png", "images/1.png"), (None, None)),
    ),
    "an unlabelled test split gives way to validation": (
        [*spread("train/", ("cat", "dog")), *spread("val/", ("cat", "dog")), "test/0.png"],
        expected("train", "train/", ("cat", "dog")) | expected("test", "val/", ("cat", "dog")),
    ),
    "an unlabelled test split alone": (
        [*spread("train/", ("cat", "dog")), "test/0.png"],
        expected(None, "train/", ("cat", "dog")),
    ),
    "test goes before validation": (
        spread("train/", "ab") + spread("val/", "ab") + spread("test/", "ab"),
        expected("train", "train/", "ab") | expected("test", "test/", "ab"),
    ),
    "one split alone": (spread("train/", "ab"), expected(None, "train/", "ab")),
    "a class with a word of a split in its name": (
        spread("", ("car", "bullet_train")),
        expected(None, "", ("car", "bullet_train")),
    ),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_usual_layouts_give_the_splits_and_classes_that_people_mean(case: str) -> None:
    names, wanted = ACCEPTED[case]
    assert assigned(laid_out(names)) == wanted


REFUSED: dict[str, tuple[list[str], str]] = {
    "a class called train": (spread("", ("train", "bus")), r"all be splits, or all be classes .*split\.by_name=false"),
    "a split beside what is none": (
        spread("train/", "ab") + spread("test/", "ab") + spread("misc/", "ab"),
        r"got misc, test, train .*split\.ignore",
    ),
    "two folders for one split": (
        spread("train/", "ab") + spread("training/", "ab") + spread("test/", "ab"),
        r"train, training .*split\.train",
    ),
    "domains of a split": (
        ["trainA/0.png", "trainB/0.png", "testA/0.png", "testB/0.png"],
        r"testA, testB, trainA, trainB .*split\.train",
    ),
    "a folder for two splits": (
        ["train_val/a/0.png", "train_val/b/0.png", "test/a/0.png"],
        r"test, train_val .*split\.train",
    ),
    "held-out splits alone": (
        spread("val/", "ab") + spread("test/", "ab"),
        r"must have a training split .*split\.train",
    ),
    "a split among the classes of another": (
        spread("train/", ("a", "test")) + spread("val/", ("a", "b")),
        r"got test in train/test/0\.png .*split\.by_name=false",
    ),
    "splits below some classes": (
        ["cat/train/0.png", "cat/test/0.png", "dog/0.png"],
        r"got train in cat/train/0\.png|got test in cat/test/0\.png",
    ),
    "all in one class with folders below": (
        [*spread("train/x/", "ab"), *spread("test/x/", "ab"), "test/x/0.png"],
        r"in one class folder, x, but it has subfolders that may be the classes",
    ),
    "images and masks in folders": (spread("", ("images", "masks")), r"got images, masks .*split\.ignore"),
    "images and masks of one name": (
        [f"cat/{i}.{end}" for i in range(4) for end in ("jpg", "png")],
        r"two files for most images .*split\.ignore",
    ),
    "masks with a suffix": (
        [f"benign/{i}{end}.png" for i in range(4) for end in ("", "_mask")],
        r"benign/0_mask.*split\.ignore",
    ),
    "images beside class folders": (
        [*spread("", "ab"), "stray.png"],
        r"got stray\.png beside class folders .*split\.ignore",
    ),
    "labels for the held-out images alone": (
        ["train/0.png", "train/1.png", *spread("test/", "ab")],
        r"training images must have labels if held-out images have labels",
    ),
    "splits in words of another language": (
        spread("训练集/", ("cat", "dog")) + spread("测试集/", ("cat", "dog")),
        r"got cat in 测试集 and in 训练集.*split\.train",
    ),
    "splits below folds": (
        [f"fold{fold}/{split}/{c}/0.png" for fold in (1, 2) for split in ("train", "test") for c in "ab"],
        r"must not share the names of their subfolders .*split\.by_name=false",
    ),
    "a split in an unusual word beside the classes": (
        [*spread("", ("cat", "dog")), *spread("holdout/", ("cat", "dog"))],
        r"got cat as a class and in holdout of x.*split\.test",
    ),
    "domains with a folder of images": (
        [f"{domain}/images/{c}/0.png" for domain in ("amazon", "webcam") for c in "ab"],
        r"must not share the names of their subfolders .*amazon.*webcam",
    ),
    "splits within one word": (
        spread("mytrain/", "ab") + spread("mytest/", "ab"),
        r"mytrain and mytest may be splits\).*split\.train",
    ),
    "file names that mean a split now and then": (
        ["train_0.png", "train_1.png", "test_0.png", "other.png"],
        r"1 test, 2 train of 4 .*split\.train",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_layouts_with_two_readings_are_refused_with_the_setting_that_decides(case: str) -> None:
    names, message = REFUSED[case]
    with pytest.raises(DataError, match=message):
        laid_out(names)


EMPTY_FOLDERS = {
    "no splits": (spread("", "ab"), ["bird/"], {}, "bird"),
    "splits above the classes": (spread("train/", "ab") + spread("test/", "ab"), ["test/c/"], {}, "test/c"),
    "splits below the classes": ([f"{c}/{s}/0.png" for c in "ab" for s in ("train", "test")], ["c/train/"], {}, "c"),
    "a class that only the other split has": (spread("train/", "ab") + spread("test/", "a"), ["test/b/"], {}, None),
    "a folder of labels": (spread("", "ab"), ["annotations/", ".cache/"], {}, None),
    "a folder that is left out": (spread("", "ab"), ["drafts/"], {"ignore": ["drafts"]}, None),
    "a folder of texts": (spread("top/", "ab"), ["top/c/notes.txt"], {}, "top/c"),
    "no classes": (spread("", "x"), ["y/"], {}, "y"),
}


@pytest.mark.parametrize("case", EMPTY_FOLDERS)
def test_class_folders_without_an_image_are_reported(case: str) -> None:
    images, folders, split, folder = EMPTY_FOLDERS[case]
    if "ignore" in split:  # a pattern has to match a file
        images = [*images, "drafts/0.png"]
    lines = [line for line in laid_out([*images, *folders], **split).lines if "without an image" in line]
    assert lines == ([f"warning: 1 class folder without an image: {folder}"] if folder else [])


def test_folders_below_the_classes_are_accepted_where_names_mean_no_split() -> None:
    layout = laid_out([f"{c}/{year}/0.png" for c in ("cat", "dog") for year in (2019, 2020)], by_name=False)
    assert layout.class_names == ("cat", "dog")


@pytest.mark.parametrize(
    "lists", [("meta/train.txt", "meta/test.txt"), ("train_test_split.txt",), ("list_eval_partition.txt",)]
)
def test_lists_that_may_say_the_split_are_reported(lists: tuple[str, ...]) -> None:
    """Food-101, CUB-200 and CelebA have such lists."""
    layout = laid_out(spread("images/", "ab"), dict.fromkeys(lists, "a/0\n"))
    assert layout.official is None
    assert any(line.startswith("warning: files that may define splits") and lists[0] in line for line in layout.lines)
    assert not any("may define splits" in line for line in laid_out(spread("images/", "ab"), {"test.txt": ""}).lines)


def test_a_class_called_train_is_a_class_where_names_mean_no_split() -> None:
    layout = laid_out(spread("", ("train", "bus")), by_name=False)
    assert assigned(layout) == expected(None, "", ("train", "bus"))


def test_patterns_decide_splits() -> None:
    names = spread("alpha/", "ab") + spread("beta/", "ab") + spread("gamma/", "ab") + ["notes/0.png"]
    layout = laid_out(names, train=["alpha"], validation=["beta"], test=["gamma"], ignore=["notes"])
    wanted = (
        expected("train", "alpha/", "ab") | expected("validation", "beta/", "ab") | expected("test", "gamma/", "ab")
    )
    assert assigned(layout) == wanted
    assert any("split.ignore: 1 image" in line for line in layout.lines)


def test_patterns_go_before_names_and_reach_files() -> None:
    names = spread("train/", "ab") + spread("test/", "ab") + spread("val/", "ab")
    assert assigned(laid_out(names, test=["val"], ignore=["test"])) == (
        expected("train", "train/", "ab") | expected("test", "val/", "ab")
    )
    flat = [f"{letter}{number}.png" for letter in "xy" for number in range(2)]
    assert assigned(laid_out(flat, train=["x*.png"], test=["y*.png"])) == {
        name: ("train" if name[0] == "x" else "test", None) for name in flat
    }


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ({"train": ["alphas"], "test": ["beta"]}, r"split\.train must match something .*'alphas'"),
        ({"train": ["alpha"]}, r"got beta/a/0\.png, outside the splits"),
        ({"train": ["alpha"], "test": ["alpha", "beta"]}, r"must not match the same path .*alpha"),
        ({"ignore": ["*"]}, r"split\.ignore must not match all images"),
    ],
)
def test_patterns_that_do_not_fit_are_named(split: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        laid_out(spread("alpha/", "ab") + spread("beta/", "ab"), **split)


def test_what_is_left_out_is_said() -> None:
    names = [*spread("train/", "ab"), *spread("val/", "ab"), "test/0.png", "test/1.png", *spread("extra/", "ab")]
    lines = "\n".join(laid_out(names).lines)
    assert "val: packed as test (validation split, 4 images)" in lines
    assert "left out: test (test split, 2 images), which has no labels" in lines
    assert "left out: extra (other split, 4 images)" in lines


@pytest.mark.parametrize("name", ["images", "train images"])
def test_an_annotation_table_labels_the_images_of_its_split(name: str) -> None:
    """Tiny ImageNet has such a table."""
    names = [f"train/n0{c}/images/{i}.JPEG" for c in (1, 2) for i in range(2)]
    names += [f"val/images/val_{i}.JPEG" for i in range(3)] + ["test/images/test_0.JPEG"]
    table = "".join(f"val_{i}.JPEG\tn0{1 + i % 2}\t0\t0\t62\t62\n" for i in range(3))
    layout = laid_out(
        names, {"val/val_annotations.txt": table, "train/n01/n01_boxes.txt": "x", "wnids.txt": "n01\nn02\n"}
    )
    assert assigned(layout) == (
        {f"train/n0{c}/images/{i}.JPEG": ("train", f"n0{c}") for c in (1, 2) for i in range(2)}
        | {f"val/images/val_{i}.JPEG": ("test", f"n0{1 + i % 2}") for i in range(3)}
    )
    assert "labels: val/val_annotations.txt" in layout.lines


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("labels.csv", "id,breed_id,label\n0,7,cat\n1,7,dog\n2,8,cat\n"),
        ("labels.csv", "0.png;cat\n1.png;dog\n2.png;cat\n"),
        ("labels.csv", "0.png|cat\n1.png|dog\n2.png|cat\n"),
        ("labels.csv", "0,0.png,cat\n1,1.png,dog\n2,2.png,cat\n"),
        ("metadata.csv", "\ufefffile_name,label\r\n0.png,cat\r\n1.png,dog\r\n2.png,cat\r\n"),
        (
            "metadata.jsonl",
            "".join(
                json.dumps({"file_name": f"{i}.png", "label": c}) + "\n" for i, c in enumerate(("cat", "dog", "cat"))
            ),
        ),
        ("dataset.json", json.dumps({"labels": {"0.png": "cat", "1.png": "dog", "2.png": "cat"}})),
    ],
)
def test_a_table_with_a_usual_name_labels_flat_images(name: str, table: str) -> None:
    layout = laid_out(["0.png", "1.png", "2.png"], {name: table})
    assert [layout.class_names[label] for label in layout.labels] == ["cat", "dog", "cat"]


@pytest.mark.parametrize("text", ["a cat", "label"])
def test_texts_about_images_are_no_classes(text: str) -> None:
    """Captions in ``metadata.csv`` of Hugging Face data sets are an example."""
    layout = laid_out(["0.png", "1.png"], {"metadata.csv": f"file_name,text\n0.png,{text}\n1.png,a dog\n"})
    assert layout.class_names == ()
    assert any(line.startswith("not used: metadata.csv, which has no column named label") for line in layout.lines)
    breeds = "id,breed\n0,pug\n1,pug\n2,corgi\n3,corgi\n"
    assert laid_out([f"{i}.png" for i in range(4)], {"labels.csv": breeds}).class_names == ("corgi", "pug")


@pytest.mark.parametrize(
    ("column", "train", "test"), [("split", "train", "test"), ("Usage", "Training", "PublicTest"), ("is_valid", 0, 1)]
)
def test_a_column_of_splits_is_no_pool(column: str, train: object, test: object) -> None:
    table = f"filename,label,{column}\n0.png,cat,{train}\n1.png,dog,{train}\n2.png,cat,{test}\n"
    with pytest.raises(DataError, match=rf"got the column {column} in labels\.csv of x\).*split\.by_name=false"):
        laid_out(["0.png", "1.png", "2.png"], {"labels.csv": table})
    assert laid_out(["0.png", "1.png", "2.png"], {"labels.csv": table}, by_name=False).class_names == ("cat", "dog")


@pytest.mark.parametrize("source", [{}, {"label_table": "labels.csv"}])
def test_a_table_may_leave_the_test_split_unlabelled(source: dict[str, Any]) -> None:
    """Tables of Kaggle do so, and may have -1 for the test split."""
    tables: Tables = {"labels.csv": "id,label\n0,cat\n1,dog\n"}
    layout = laid_out(["train/0.png", "train/1.png", "test/9.png"], tables, source)
    assert (layout.class_names, layout.by_table) == (("cat", "dog"), True)
    assert not any("not used" in line for line in layout.lines)
    own: Tables = {"train/labels.csv": "0.png,0\n1.png,1\n", "test/labels.csv": "9.png,-1\n"}
    assert laid_out(["train/0.png", "train/1.png", "test/9.png"], own).by_table


def test_a_table_and_its_column_can_be_named() -> None:
    table = "picture_id,species,image\n9,cat,0.png\n9,dog,1.png\n"
    layout = laid_out(["0.png", "1.png"], {"about.csv": table}, {"label_table": "about.csv", "label_column": "species"})
    assert layout.class_names == ("cat", "dog")
    with pytest.raises(DataError, match=r"must have a column of image names and the column genus"):
        laid_out(["0.png", "1.png"], {"about.csv": table}, {"label_table": "about.csv", "label_column": "genus"})
    with pytest.raises(DataError, match=r"label_table must be a file below x \(got other\.csv\)"):
        laid_out(["0.png"], {"about.csv": table}, {"label_table": "other.csv"})


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (
            {"labels.csv": "0.png,cat\n1.png,dog\n"},
            r"labels\.csv of x must label every image \(got no label for 2\.png",
        ),
        (
            {"labels.csv": "0.png,a\n0.png,b\n1.png,a\n2.png,a\n"},
            r"must give each image one label \(got two labels for 0\.png\)",
        ),
        ({"labels.csv": "0.png,0\n1.png,dog\n2.png,1\n"}, r"all numbers or all text"),
        ({"labels.csv": "0.png,0\n1.png,-1\n2.png,1\n"}, r"must label every image \(got the label -1 for 1 images\)"),
        ({"dataset.json": json.dumps({"labels": [["0.png", [0.5, 1.0]]]})}, r"one whole number or text .*0\.png"),
        (
            {
                "labels.csv": "0.png,a\n1.png,a\n2.png,a\n",
                "dataset.json": '{"labels": [["0.png",0],["1.png",0],["2.png",0]]}',
            },
            r"only one table may label the images",
        ),
        ({"labels.csv": b"\xff\xfe0\x00"}, r"must be UTF-8"),
    ],
)
def test_tables_that_do_not_cover_the_images_are_refused(tables: Tables, message: str) -> None:
    with pytest.raises(DataError, match=message):
        laid_out(["0.png", "1.png", "2.png"], tables)


def test_a_list_of_class_names_is_not_taken_for_labels() -> None:
    layout = laid_out(["0.png", "1.png"], {"labels.txt": "cat animal\ndog animal\n"})
    assert layout.class_names == ()
    assert "not used: labels.txt, which does not name any image of the source" in layout.lines


def test_dataset_json_goes_before_folders_with_a_byte_order_mark_or_below_a_folder() -> None:
    names = [f"my/0000{i}/img{i}.png" for i in range(4)]
    labels = json.dumps({"labels": [[f"0000{i}/img{i}.png", i % 2] for i in range(4)]})
    for text in (labels.encode(), b"\xef\xbb\xbf" + labels.encode()):
        layout = laid_out(names, {"my/dataset.json": text})
        assert layout.class_names == ("0", "1")
        assert layout.labels.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("file", "text", "wanted"),
    [
        ("names.json", '["zero", "one"]', ("zero", "one")),
        ("names.json", '{"1": "one", "0": "zero"}', ("zero", "one")),
        ("names.json", '{"one": 1, "zero": 0}', ("zero", "one")),
        ("names.csv", "label,name\n1,one\n0,zero\n", ("zero", "one")),
        ("names.txt", "zero\none\n", ("zero", "one")),
    ],
)
def test_a_table_names_the_classes(tmp_path: Path, file: str, text: str, wanted: tuple[str, ...]) -> None:
    (tmp_path / file).write_text(text)
    source = {"label_names": str(tmp_path / file)}
    assert laid_out(spread("", ("0", "1")), source=source).class_names == wanted
    layout = laid_out(["a.png", "b.png"], {"labels.csv": "a.png,1\nb.png,0\n"}, source)
    assert (layout.class_names, layout.labels.tolist()) == (wanted, [1, 0])


def test_a_table_names_classes_of_text_and_gives_their_order(tmp_path: Path) -> None:
    (tmp_path / "synsets.txt").write_text("n02 goldfish bowl\nn01 tench\n")
    layout = laid_out(spread("", ("n01", "n02")), source={"label_names": str(tmp_path / "synsets.txt")})
    assert layout.class_names == ("goldfish bowl", "tench")
    assert layout.labels.tolist() == [1, 1, 0, 0]
    with pytest.raises(DataError, match=r"must name every label \(got no name for 'n03'"):
        laid_out(spread("", ("n01", "n03")), source={"label_names": str(tmp_path / "synsets.txt")})


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_other_class_names_make_another_data_set(kind: str, tmp_path: Path) -> None:
    path, names = tmp_path / "in", tmp_path / "names.csv"
    files = {f"{c}/{i}.png": PNG for c in "ab" for i in range(2)}
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    else:
        for name, content in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
    digests = set()
    for name in ("tabby", "tomcat"):
        names.write_text(f"wnid,words\na,{name}\nb,dog\n")
        source = open_source(SourceConfig.model_validate({"kind": kind, "path": str(path), "label_names": str(names)}))
        assert source.class_names == (name, "dog")
        digests.add(source.digest)
    assert len(digests) == 2


def test_names_of_a_zip_are_those_of_a_folder(tmp_path: Path) -> None:
    """Programs on Windows write backslashes. A zip that has a name twice is refused."""
    path = tmp_path / "in.zip"
    names = [f"{split}\\{c}\\0.png" for split in ("train", "test") for c in "ab"] + ["./train/a/1.png", "/test/a/1.png"]
    for double in (False, True):
        with zipfile.ZipFile(path, "w") as archive:
            for name in [*names, *["train/a/0.png"] * double]:
                archive.writestr(name, PNG)
        if not double:
            source = open_source(SourceConfig(kind="zip", path=str(path)))
            assert source.class_names == ("a", "b")
            assert source.official is not None
            assert np.bincount(source.official).tolist() == [3, 0, 3]
            assert source.image(5).shape == (3, 4, 4)
    with pytest.raises(DataError, match=r"a zip must hold each file name once \(got train/a/0\.png 2 times"):
        open_source(SourceConfig(kind="zip", path=str(path)))


def test_junk_is_passed_over_and_counted() -> None:
    junk = ["cat/._0.png", "__MACOSX/cat/0.png", "cat/.DS_Store", "dog/Thumbs.db", "dog/@eaDir/0.png", "readme.md"]
    layout = laid_out([*spread("", ("cat", "dog")), *junk])
    assert assigned(layout) == expected(None, "", ("cat", "dog"))
    assert dict(layout.ignored) == {"._*": 1, "__MACOSX": 1, ".DS_Store": 1, "Thumbs.db": 1, "@eaDir": 1, "*.md": 1}


def opened(kind: str, path: Path, **split: Any) -> ImageSource:
    return open_source(
        SourceConfig.model_validate({"kind": kind, "path": str(path)}), SplitConfig.model_validate(split)
    )


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_folders_and_zips_follow_the_same_rules(kind: str, tmp_path: Path) -> None:
    names = spread("top/Train/", "ab") + spread("top/Valid/", "ab")
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name in [*names, "__MACOSX/top/._x.png"]:
            archive.writestr(name, PNG)
    path = tmp_path / "x.zip"
    path.write_bytes(content.getvalue())
    if kind == "folder":
        path = tmp_path / "x"
        zipfile.ZipFile(tmp_path / "x.zip").extractall(path)
    source = opened(kind, path)
    assert source.official is not None
    layout = {
        source.origin(i): (PACKED[source.official[i]], source.class_names[source.labels[i]]) for i in range(len(source))
    }
    assert layout == expected("train", "top/Train/", "ab") | expected("test", "top/Valid/", "ab")
    assert source.ignored == {"__MACOSX": 1}


# --- random trees with planted splits and classes

SPLIT_NAMES = {
    "train": ("train", "Training", "TRAIN", "train2017", "trn"),
    "validation": ("val", "Valid", "validation", "VAL2017", "dev"),
    "test": ("test", "Testing", "TEST", "test2017"),
    "other": ("extra", "unlabeled"),
}
CLASS_NAMES = ("cat", "dog", "Rose", "n01440764", "7", "ship 2", "été", "bullet_train", "images2", "data_x")


@st.composite
def planted(draw: st.DrawFn) -> tuple[list[str], dict[str, tuple[str, str | None]]]:
    """Random paths, and the split and class of each."""
    roles = draw(st.sampled_from([(), ("train",), ("train", "test"), ("train", "validation"), tuple(SPLIT_NAMES)]))
    folders = {role: draw(st.sampled_from(SPLIT_NAMES[role][: 4 if len(roles) == 1 else None])) for role in roles}
    classes = draw(st.just([]) | st.lists(st.sampled_from(CLASS_NAMES), min_size=2, max_size=4, unique=True))
    above = draw(st.sampled_from(["", "top/", "some data/set 1/"])) if roles or classes else ""
    within = draw(st.sampled_from(["", "images/"]))
    below = draw(st.sampled_from(["", "images/", "JPEGImages/"]))
    class_first = bool(roles and classes) and draw(st.booleans())
    truth: dict[str, tuple[str, str | None]] = {}
    for role in roles or ("",):
        unlabelled = role in ("test", "other") and draw(st.booleans())
        for name in [None] if unlabelled or not classes else classes:
            folder = f"{folders[role]}/" if role else ""
            middle = f"{name}/" if name else ""
            tail = f"{middle}{folder}" if class_first and name else f"{folder}{within}{middle}"
            for number in range(draw(st.integers(1, 3))):
                truth[f"{above}{tail}{below if name else ''}{number}.png"] = (role, name)
    junk = draw(st.lists(st.sampled_from(["._a.png", "__MACOSX/b.png", "x/.DS_Store", "notes.txt"]), unique=True))
    return [*truth, *(f"{above}{name}" for name in junk)], truth


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(planted())
def test_what_is_accepted_is_what_was_planted(case: tuple[list[str], dict[str, tuple[str, str | None]]]) -> None:
    """Random trees give the planted splits and classes, or a refusal, or a line that reports what is left out."""
    names, truth = case
    try:
        layout = laid_out(names)
    except DataError:
        return
    roles = {role for role, _ in truth.values()}
    packed = {name: (layout.official is not None and PACKED[layout.official[i]]) for i, name in enumerate(layout.names)}
    for number, name in enumerate(layout.names):
        role, planted_class = truth[name]
        assert (layout.class_names[layout.labels[number]] if layout.class_names else None) == planted_class, name
        if packed[name]:
            assert (packed[name] == "train") == (role == "train"), name
    left_out = roles - {truth[name][0] for name in layout.names}
    for role in left_out:
        assert any(line.startswith("left out:") and f"({role} split" in line for line in layout.lines)
    if layout.official is None:
        assert len(roles) == 1 or any("no held-out split with labels" in line for line in layout.lines)
