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
    """Lossless: ``png``; ``webp``, smaller and slower to write; ``raw``, an array, large and fast to read. Lossy:
    ``jpeg``."""
    jpeg_quality: int = Field(default=95, ge=1, le=100)
    """Quality of ``jpeg``, which is written without chroma subsampling."""


class DataSetConfig(Section):
    """A packed data set to read."""

    path: str
    """Folder or URL that holds ``manifest.json``."""
    verify: Literal["size", "full"] = "size"
    """What is verified at the start: sizes of files, or every sha256 (``full``). In both cases the checksum of every
    sample is verified whenever it is read."""


class AugmentationConfig(Section):
    """Random changes to training images; they depend on (seed, epoch, sample) alone."""

    flip: bool = False
    """Mirror left and right with probability 1/2."""
    crop_pixels: int | None = Field(default=None, ge=1)
    """Side of a square that is cropped at a random place; it is the image size of the model. None crops nothing."""


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
    """More data sets with the same image size and classes, for example generated ones."""
    augmentation: AugmentationConfig = AugmentationConfig()
    num_workers: int = Field(default=0, ge=0)
    """Processes of each rank that read and decode; 0 does it in the rank itself. They do not change the batches."""
    read_threads: int | None = Field(default=None, ge=0)
    """Concurrent reads in each of these processes, which prefetch one block for every slot; None is 16 for URLs and 0
    for local folders."""
    max_corrupt_fraction: float = Field(default=1e-3, ge=0, le=1)
    """A corrupt sample is replaced by the next one and listed in ``quarantine-*.jsonl`` in the run folder. The run
    stops if their share of all samples that were read (or of 10,000, at the start) is larger than this."""

    shuffle_block: int = Field(default=16, ge=1)
    """Samples that are read as one contiguous range. It changes the order of samples. Larger blocks need fewer reads
    and more memory: slots per rank x block x bytes per sample. From an object store, reads of about 2 MB are as fast as
    local files; ``--dry-run`` prints their size."""
