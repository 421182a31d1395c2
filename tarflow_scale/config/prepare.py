"""Packing: images in, WebDataset shards out."""

from typing import Literal, Self

from pydantic import Field, model_validator

from tarflow_scale.config.base import Root, Section
from tarflow_scale.config.data import EncodedShardsConfig
from tarflow_scale.config.verb import Flag, Verb

__all__ = ["LAYOUT_KINDS", "VERB", "PackedShardsConfig", "PrepareConfig", "SourceConfig", "SplitConfig"]

LAYOUT_KINDS = ("folder", "zip", "parquet", "webdataset")
"""Sources whose splits and classes are found by names."""
_IMAGE_KINDS = ("digits", "mnist", "cifar", "imagenet_npz", *LAYOUT_KINDS)
_KINDS_OF_SETTINGS = {
    **dict.fromkeys(("size_pixels", "resize", "orientation", "transparency"), LAYOUT_KINDS),
    **dict.fromkeys(("bit_depth", "bad_images"), _IMAGE_KINDS),
    "condition_columns": ("vectors",),
    "in_place": ("webdataset",),
    "label_column": (*LAYOUT_KINDS, "vectors"),
    "label_table": ("folder", "zip"),
    "label_names": LAYOUT_KINDS,
    "image_member": ("parquet", "webdataset"),
}


class SourceConfig(Section):
    """Where images come from (verb ``prepare``). Paths may be URLs."""

    kind: Literal["digits", "folder", "zip", "mnist", "cifar", "imagenet_npz", "parquet", "webdataset", "vectors"]
    """``digits``: scikit-learn's 1,797 handwritten digits, 8x8, 4 bits, 10 classes, no network.
    ``folder``: image files (png, jpg, jpeg, jfif, webp, bmp, tif, tiff, ppm, pgm, avif); each sub-folder is a class, or
    there are no classes, or a label table names them (``label_table``). Folders named like ``train`` and ``val`` above
    the classes are an official split. Files with several frames or pages, and channels of more than 8 bits, cannot be
    used.
    ``zip``: the same in a zip.
    ``mnist``: MNIST, Fashion-MNIST and the like, as ``path.npz`` or a folder of IDX files, plain or gzipped.
    ``cifar``: CIFAR-10 or -100, pickles (read without running code) or binaries, unpacked or ``.tar.gz``.
    ``imagenet_npz``: downsampled ImageNet, ``train_data_batch_*.npz`` and ``val_data.npz``.
    ``parquet``: tables with image bytes as Hugging Face stores them; needs the extra ``parquet``.
    ``webdataset``: tars of other programs: a folder of them, one tar, or a pattern such as ``tars/{00..31}.tar``.
    ``vectors``: vectors of numbers instead of images, ``path.npz`` (arrays ``x``, and perhaps ``labels``,
    ``conditions``, and the same with ``_test``) or ``path.csv`` with a header; packed unchanged, in float32."""
    path: str | None = None
    """Where the images are; all kinds but ``digits`` need it."""
    size_pixels: int | None = Field(default=None, ge=1)
    """Side of the square training images; None keeps the size of the images."""
    bit_depth: int | None = Field(default=None, ge=1, le=8)
    """Number of high bits of a pixel to keep; None keeps all bits of the source."""
    resize: Literal["refuse", "center_crop"] = "refuse"
    """``refuse``: images of another size are an error. ``center_crop``: shrink or enlarge the short side to
    ``size_pixels``, then crop the centre."""
    resample: Literal["lanczos", "box", "bicubic"] = "lanczos"
    """Filter of ``center_crop``; named in the manifest. All of them average when they shrink."""
    orientation: Literal["apply", "ignore"] = "apply"
    """``apply``: images are turned as their EXIF tag says, as in viewers. ``ignore``: they are read as they are stored,
    as in published protocols that ignore the tag."""
    transparency: Literal["white", "black", "refuse"] = "white"
    """The colour under transparent pixels; ``refuse``: an image that has any cannot be used."""
    bad_images: Literal["refuse", "skip"] = "refuse"
    """``refuse``: an image that cannot be used is an error. ``skip``: it is left out, and listed in
    ``skipped.jsonl``."""
    max_bad_fraction: float = Field(default=0.1, ge=0, le=1)
    """Largest share of the images that ``bad_images=skip`` may leave out."""
    label_column: str | None = None
    """Where the class is. ``vectors`` and ``parquet``: the column. ``webdataset``: the member's extension (``cls``,
    ``txt``) or a field of the sample's ``json``. ``folder`` and ``zip``: the column of the label table. None tries the
    usual names."""
    label_table: str | None = None
    """``folder`` and ``zip``: a file below ``path`` that names the label of every image: CSV, TSV or JSON lines with a
    header, two columns of text, or ``dataset.json`` of StyleGAN and EDM. None reads tables with a usual name
    (``dataset.json``, ``*annotations.txt``, ``labels.csv``, ``metadata.csv``)."""
    label_names: str | None = None
    """Path or URL of a table that names the classes: a JSON list or mapping, or rows ``label,name`` (CSV, TSV, or text
    separated by a blank). If the labels are text, its order is that of the classes."""
    image_member: str | None = None
    """Which image is used if a sample has several. ``webdataset``: the member's extension (``jpg``, ``input.jpg``).
    ``parquet``: the column."""
    condition_columns: tuple[str, ...] = ()
    """Of a CSV of vectors: columns of numbers that are the condition of a vector."""
    in_place: bool = False
    """``webdataset``: index the tars in place: an index beside each and a manifest make them a data set;
    ``shards.path`` is then ``source.path``."""

    @model_validator(mode="after")
    def _complete(self) -> "SourceConfig":
        if self.kind != "digits" and not self.path:
            raise ValueError(f"source.path is required for kind={self.kind} (got None); name the file or folder")
        for name, kinds in _KINDS_OF_SETTINGS.items():
            if getattr(self, name) != type(self).model_fields[name].default and self.kind not in kinds:
                raise ValueError(f"source.{name} needs kind={' or '.join(kinds)} (got {self.kind}); remove it")
        if self.resize == "center_crop" and self.size_pixels is None:
            raise ValueError("source.size_pixels is required for resize=center_crop (got None); set the side in pixels")
        shaped = self.size_pixels is not None or self.bit_depth is not None or self.bad_images != "refuse"
        if self.in_place and (shaped or self.transparency == "refuse"):
            raise ValueError("source.in_place leaves images as they are (got settings that change them); remove them")
        return self


class PackedShardsConfig(EncodedShardsConfig):
    """Where ``prepare`` writes, and how images are stored."""

    num_workers: int = Field(default=1, ge=1)
    """Number of processes that pack; it does not affect the packed bytes."""


class SplitConfig(Section):
    """How ``prepare`` divides the source into ``train`` and ``test``."""

    kind: Literal["auto", "official", "stratified"] = "auto"
    """``official``: the split of the source. ``stratified``: ``test_fraction`` of each class. ``auto``: official if the
    source has a split, else stratified."""
    by_name: bool = True
    """Folders, tables and tars with a usual name (such as train, val, test, in any case) are splits. False: neither
    names, nor columns, nor equal folders below the classes mean a split, for instance if ``train`` is a class beside
    ``bus``."""
    train: tuple[str, ...] = ()
    """Patterns of the paths below the source that are for training, such as ``[seg_train]`` or ``["part-0*.tar"]``; a
    folder means all files below it. Patterns take precedence over names."""
    validation: tuple[str, ...] = ()
    """Patterns of the paths that are packed as ``validation``, with or without ``test``."""
    test: tuple[str, ...] = ()
    """Patterns of the paths that are packed as ``test``. Without patterns, the test split of the source is packed as
    ``test``, or its validation split if it has no labelled test split."""
    ignore: tuple[str, ...] = ()
    """Patterns of the paths that are left out, such as ``[masks]``."""
    test_fraction: float = Field(default=0.2, ge=0, lt=1)
    """Share of each class that goes to the test split of ``stratified``; 0 makes no test split."""
    near_duplicates: Literal["keep", "report", "drop"] = "report"
    """Treatment of copies and near copies, within and across splits, as `tarflow_scale.shards.duplicates` defines them.
    ``report``: count them, and name some, after packing. ``drop``: leave out images for training that are like a
    held-out one, or like an earlier one; held-out splits stay complete, so that figures on them stay comparable. This
    decodes all images twice. ``keep``: do not search them."""
    seed: int = Field(default=0, ge=0, lt=2**64)
    """Seed of the split and of the order in which samples are packed."""

    @property
    def patterns(self) -> dict[str, tuple[str, ...]]:
        """Patterns by what they decide."""
        return {"train": self.train, "validation": self.validation, "test": self.test, "ignore": self.ignore}

    @model_validator(mode="after")
    def _one_way(self) -> "SplitConfig":
        if self.kind == "stratified" and (self.train or self.validation or self.test):
            raise ValueError(
                "split.train, split.validation and split.test make an official split (got kind=stratified); remove "
                "them, or leave images out with split.ignore"
            )
        if (self.validation or self.test) and not self.train and not self.by_name:
            raise ValueError("split.train is required beside split.test where split.by_name is false; name it")
        return self


class PrepareConfig(Root):
    """Images in, WebDataset shards out: ``<shards.path>/train`` and ``<shards.path>/test``."""

    source: SourceConfig
    split: SplitConfig = SplitConfig()
    shards: PackedShardsConfig

    @model_validator(mode="after")
    def _in_place_stays(self) -> Self:
        if self.source.in_place and self.shards.path != self.source.path:
            raise ValueError(
                f"shards.path must be source.path where source.in_place is set (got {self.shards.path} and "
                f"{self.source.path}); tars that are indexed in place do not move"
            )
        if self.source.in_place and self.split != SplitConfig():
            raise ValueError("split has no effect where source.in_place is set; remove it")
        if self.source.kind not in LAYOUT_KINDS and any(self.split.patterns.values()):
            raise ValueError(
                f"split patterns need source.kind={' or '.join(LAYOUT_KINDS)} (got {self.source.kind}); remove them"
            )
        return self


VERB = Verb(
    "verbs.prepare.driver",
    PrepareConfig,
    "pack images into WebDataset shards",
    "tarflow-scale prepare configs/prepare/digits.yaml shards.path=data/digits",
    flags=(
        Flag("check", "verify every byte of a packed data set instead", ("DIR",), function="check"),
        Flag("stats", "print what is in a packed data set instead", ("DIR",), function="statistics"),
        Flag(
            "npz",
            "write a packed data set as the npz that ADM's evaluator takes instead",
            ("DIR", "FILE"),
            function="export",
        ),
    ),
)
