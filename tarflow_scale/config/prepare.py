"""Configuration of the verb ``prepare``."""

from typing import Literal, Self

from pydantic import Field, model_validator

from tarflow_scale.config.base import Root, Section
from tarflow_scale.config.data import EncodedShardsConfig, ImageSize
from tarflow_scale.config.verb import Flag, Verb

__all__ = ["LAYOUT_KINDS", "VERB", "PackedShardsConfig", "PrepareConfig", "SourceConfig", "SplitConfig"]

LAYOUT_KINDS = ("folder", "zip", "parquet", "webdataset")
"""Kinds of sources in which names of folders and files determine the splits and classes."""
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
    """The images to pack (verb ``prepare``). Paths may be URLs."""

    kind: Literal["digits", "folder", "zip", "mnist", "cifar", "imagenet_npz", "parquet", "webdataset", "vectors"]
    """Kind of source.
    ``digits``: the 1,797 handwritten digits of scikit-learn, 8x8, 4 bits, 10 classes; needs no network.
    ``folder``: image files (png, jpg, jpeg, jfif, webp, bmp, tif, tiff, ppm, pgm, avif). Each sub-folder is a class, or
    a table contains the labels (``label_table``), or there are no classes. If folders with names such as ``train`` and
    ``val`` contain the class folders, they are the official split. Files with several frames or pages, or with more
    than 8 bits per channel, cannot be used.
    ``zip``: a zip file with the same content as for ``folder``.
    ``mnist``: MNIST, Fashion-MNIST and similar sets: ``path.npz``, or a folder of IDX files, plain or gzipped.
    ``cifar``: CIFAR-10 or CIFAR-100: pickles (read without running code) or binaries, unpacked or ``.tar.gz``.
    ``imagenet_npz``: downsampled ImageNet, ``train_data_batch_*.npz`` and ``val_data.npz``.
    ``parquet``: tables with image bytes, as Hugging Face stores them; needs the extra ``parquet``.
    ``webdataset``: tars from other programs: a folder of tars, one tar, or a pattern such as ``tars/{00..31}.tar``.
    ``vectors``: vectors of numbers instead of images, packed unchanged in float32. Either ``path.npz`` with the array
    ``x``, optionally ``labels`` and ``conditions``, and optionally the same arrays with the suffix ``_test``; or
    ``path.csv`` with a header."""
    path: str | None = None
    """Path of the images; required for all kinds except ``digits``."""
    size_pixels: ImageSize | None = None
    """Size of the packed images: the side of a square in pixels, or ``[height, width]``, such as ``[192, 128]``. None
    keeps the size of the images, which must all have the same one."""
    bit_depth: int | None = Field(default=None, ge=1, le=8)
    """Number of most significant bits to keep per pixel; None keeps all bits of the source."""
    resize: Literal["refuse", "center_crop"] = "refuse"
    """``refuse``: images of another size are an error. ``center_crop``: scale an image, with its aspect ratio, until it
    just covers ``size_pixels``, then crop the centre. For a square, this scales the short side to ``size_pixels``."""
    resample: Literal["lanczos", "box", "bicubic"] = "lanczos"
    """Filter of ``center_crop``, recorded in the manifest. All filters are antialiased when they shrink an image."""
    orientation: Literal["apply", "ignore"] = "apply"
    """``apply``: rotate images by their EXIF tag, as viewers do. ``ignore``: use the stored pixels, as in published
    protocols that ignore the tag."""
    transparency: Literal["white", "black", "refuse"] = "white"
    """Colour that replaces transparent pixels. ``refuse``: an image with transparent pixels cannot be used."""
    bad_images: Literal["refuse", "skip"] = "refuse"
    """``refuse``: an image that cannot be used is an error. ``skip``: leave it out, and list it in
    ``skipped.jsonl``."""
    max_bad_fraction: float = Field(default=0.1, ge=0, le=1)
    """Maximum share of the images that ``bad_images=skip`` may leave out."""
    label_column: str | None = None
    """Where the label is stored. ``vectors`` and ``parquet``: a column. ``webdataset``: the extension of a tar member
    (``cls``, ``txt``), or a field of the ``json`` member. ``folder`` and ``zip``: a column of the label table. None
    tries common names."""
    label_table: str | None = None
    """``folder`` and ``zip``: a file below ``path`` with the label of every image: CSV, TSV or JSON lines with a
    header, text in two columns, or ``dataset.json`` of StyleGAN and EDM. None looks for common names
    (``dataset.json``, ``*annotations.txt``, ``labels.csv``, ``metadata.csv``)."""
    label_names: str | None = None
    """Path or URL of a table with the names of the classes: a JSON list or mapping, or rows ``label,name`` (CSV, TSV,
    or text separated by a blank). If labels are text, the order of the table is the order of the classes."""
    image_member: str | None = None
    """The image to use if a sample has several. ``webdataset``: the extension of a tar member (``jpg``,
    ``input.jpg``). ``parquet``: a column."""
    condition_columns: tuple[str, ...] = ()
    """``vectors`` as CSV: the columns that form the condition of a vector."""
    in_place: bool = False
    """``webdataset``: do not copy the tars; write an index beside each tar, and a manifest, so that the folder becomes
    a data set. ``shards.path`` must equal ``source.path``."""

    @model_validator(mode="after")
    def _complete(self) -> "SourceConfig":
        if self.kind != "digits" and not self.path:
            raise ValueError(
                f"source.path is required for kind={self.kind} (got None); set it to the path of the file or folder"
            )
        for name, kinds in _KINDS_OF_SETTINGS.items():
            if getattr(self, name) != type(self).model_fields[name].default and self.kind not in kinds:
                raise ValueError(f"source.{name} needs kind={' or '.join(kinds)} (got {self.kind}); remove it")
        if self.resize == "center_crop" and self.size_pixels is None:
            raise ValueError(
                "source.size_pixels is required for resize=center_crop (got None); set it to a number of pixels"
            )
        shaped = self.size_pixels is not None or self.bit_depth is not None or self.bad_images != "refuse"
        if self.in_place and (shaped or self.transparency == "refuse"):
            raise ValueError(
                "source.in_place cannot be combined with settings that change or refuse images (got at least one of "
                "size_pixels, bit_depth, bad_images and transparency); remove these settings"
            )
        return self


class PackedShardsConfig(EncodedShardsConfig):
    """Where ``prepare`` writes, and how images are stored."""

    num_workers: int = Field(default=1, ge=1)
    """Number of processes that pack images; it does not affect the packed bytes."""


class SplitConfig(Section):
    """How ``prepare`` divides the source into ``train``, ``validation`` and ``test``."""

    kind: Literal["auto", "official", "stratified"] = "auto"
    """``official``: use the split of the source. ``stratified``: move ``test_fraction`` of each class to ``test``.
    ``auto``: ``official`` if the source has a split, otherwise ``stratified``."""
    by_name: bool = True
    """Whether folders, tables and tars with common names (train, val, test, in upper or lower case) are splits. Set it
    to false if they are not, for instance if ``train`` is a class beside ``bus``. A split column in a table, or a
    folder with such a name below a class, is an error if this is true, and is ignored if false."""
    train: tuple[str, ...] = ()
    """Patterns of paths below the source that are packed as ``train``, such as ``[seg_train]`` or ``["part-0*.tar"]``.
    A folder means all files below it. Patterns take precedence over names."""
    validation: tuple[str, ...] = ()
    """Patterns of paths that are packed as ``validation``."""
    test: tuple[str, ...] = ()
    """Patterns of paths that are packed as ``test``. Without patterns, the test split of the source is packed as
    ``test``, or its validation split if the source has no labelled test split."""
    ignore: tuple[str, ...] = ()
    """Patterns of paths that are left out, such as ``[masks]``."""
    test_fraction: float = Field(default=0.2, ge=0, lt=1)
    """``stratified``: share of each class that is packed as ``test``; 0 packs no test split."""
    near_duplicates: Literal["keep", "report", "drop"] = "report"
    """What to do about copies and near copies, within and across splits; `tarflow_scale.shards.duplicates` defines
    them. ``report``: count them after packing, and print a few. ``drop``: leave out training images that resemble a
    held-out image or an earlier training image; this decodes all images twice. Held-out splits stay complete, so that
    numbers on them stay comparable. ``keep``: do not look for them."""
    seed: int = Field(default=0, ge=0, lt=2**64)
    """Seed of the split and of the order in which samples are packed."""

    @property
    def patterns(self) -> dict[str, tuple[str, ...]]:
        """Patterns by the name of the split; the patterns under ``ignore`` exclude images."""
        return {"train": self.train, "validation": self.validation, "test": self.test, "ignore": self.ignore}

    @model_validator(mode="after")
    def _one_way(self) -> "SplitConfig":
        if self.kind == "stratified" and (self.train or self.validation or self.test):
            raise ValueError(
                "split.train, split.validation and split.test define an official split, which cannot be combined with "
                "split.kind=stratified (got both); remove split.kind, or exclude images with split.ignore instead"
            )
        if (self.validation or self.test) and not self.train and not self.by_name:
            raise ValueError(
                "split.train is required if split.test or split.validation is set and split.by_name is false (got "
                "none); set split.train to the patterns of the training images"
            )
        return self


class PrepareConfig(Root):
    """Write the shards of each split to a folder below ``shards.path``: ``train``, ``test``, ``validation``."""

    source: SourceConfig
    split: SplitConfig = SplitConfig()
    shards: PackedShardsConfig

    @model_validator(mode="after")
    def _in_place_stays(self) -> Self:
        if self.source.in_place and self.shards.path != self.source.path:
            raise ValueError(
                f"shards.path must equal source.path if source.in_place is true, because the tars stay where they are "
                f"(got {self.shards.path} and {self.source.path}); set both to the same path"
            )
        if self.source.in_place and self.split != SplitConfig():
            raise ValueError("split has no effect if source.in_place is true (got both); remove the section split")
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
        Flag("check", "instead, verify every byte of a packed data set", ("DIR",), function="check"),
        Flag("stats", "instead, print what is in a packed data set", ("DIR",), function="statistics"),
        Flag(
            "npz",
            "instead, write a packed data set as the npz file that ADM's evaluator reads",
            ("DIR", "FILE"),
            function="export",
        ),
    ),
)
