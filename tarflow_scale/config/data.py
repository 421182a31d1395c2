"""Data sets to read, and shards to write."""

from typing import Literal

from pydantic import Field

from tarflow_scale.config.base import Section

__all__ = [
    "AugmentationConfig",
    "DataConfig",
    "DataSetConfig",
    "EncodedShardsConfig",
    "MixedDataSetConfig",
    "ShardsConfig",
]


class ShardsConfig(Section):
    """Where a data set is written, and the size of its shards (verbs ``prepare`` and ``generate``)."""

    path: str
    """Folder or URL of the data set."""
    samples_per_shard: int = Field(default=1000, ge=1)
    """Images in one tar. For object stores, choose tars of a few hundred MB."""


class EncodedShardsConfig(ShardsConfig):
    """Shards of images that this package encodes."""

    codec: Literal["png", "webp", "jpeg", "raw"] = "png"
    """``png``, ``webp`` (smaller and slower to write) and ``raw`` (an array, large and fast to read) are lossless;
    ``jpeg`` is not."""
    jpeg_quality: int = Field(default=95, ge=1, le=100)
    """Quality of ``jpeg``, which is written without chroma subsampling."""


class DataSetConfig(Section):
    """A packed data set to read."""

    path: str
    """Folder or URL that holds ``manifest.json``."""
    verify: Literal["size", "full"] = "size"
    """Checks before the first step: sizes, or every sha256. In both cases, each sample's checksum is verified at every
    read."""


class AugmentationConfig(Section):
    """Random changes of training images, a function of (seed, epoch, sample)."""

    flip: bool = False
    """Mirror left and right with probability 1/2."""
    crop_pixels: int | None = Field(default=None, ge=1)
    """Side of a square that is cropped at random; the model then has images of this size. None crops nothing."""


class MixedDataSetConfig(Section):
    """An additional data set to train on."""

    path: str
    """Folder or URL that holds ``manifest.json``."""
    weight: float = Field(gt=0)
    """Share of the global batch, relative to the weights of the other sets."""


class DataConfig(DataSetConfig):
    """A packed data set to train on, or several; each fills a fixed share of every global batch."""

    weight: float = Field(default=1.0, gt=0)
    """Share of the global batch, relative to the weights in ``mix``."""
    mix: tuple[MixedDataSetConfig, ...] = ()
    """More data sets of images with the same shape and classes, such as generated ones."""
    augmentation: AugmentationConfig = AugmentationConfig()
    num_workers: int = Field(default=0, ge=0)
    """Processes of a rank that read and decode; with 0 the rank does it itself. They do not change the batches."""
    read_threads: int | None = Field(default=None, ge=0)
    """Concurrent reads of each process, one block ahead of every slot; None is 16 for URLs and 0 for local folders."""
    max_corrupt_fraction: float = Field(default=1e-3, ge=0, le=1)
    """A corrupt sample is replaced by the next one and listed in ``quarantine-*.jsonl`` of the run folder. The run
    stops if more than this share of the samples that all ranks read (at least 10,000) are corrupt."""
    shuffle_block: int = Field(default=16, ge=1)
    """Samples of one contiguous read; it is part of the order of samples. Larger blocks mean fewer, larger reads and
    more memory: slots per rank x block x bytes per sample. With reads of about 2 MB an object store is as fast as local
    files; ``--dry-run`` prints their size."""
