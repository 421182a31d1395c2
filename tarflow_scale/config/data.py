"""Data sets to read, and shards to write."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveInt, TypeAdapter, ValidationError

from tarflow_scale.config.base import Section

__all__ = [
    "AugmentationConfig",
    "DataConfig",
    "DataSetConfig",
    "EncodedShardsConfig",
    "ImageSize",
    "MixedDataSetConfig",
    "ShardsConfig",
    "height_and_width",
    "size_of",
]

_SIDES = TypeAdapter(tuple[PositiveInt, PositiveInt])


def _as_size(value: Any) -> "ImageSize":
    """Validate a size in any of its forms: a number, ``[height, width]``, or text such as ``192x128``."""
    sides = value.split("x") if isinstance(value, str) and "x" in value else value
    try:
        height, width = _SIDES.validate_python(sides if isinstance(sides, list | tuple) else (sides, sides))
    except ValidationError as error:
        raise ValueError(
            "a size must be a number of pixels, at least 1, or a height and a width, such as 192x128"
        ) from error
    return size_of(height, width)


ImageSize = Annotated[int | tuple[int, int], BeforeValidator(_as_size)]
"""Size of images in pixels: the side of a square, or height and width of a rectangle. A square is always one number, so
configurations and records of square images do not depend on how the size was written."""


def size_of(height: int, width: int) -> ImageSize:
    """The size as it is stored: one number for a square."""
    return height if height == width else (height, width)


def height_and_width(size: ImageSize) -> tuple[int, int]:
    """Height and width of images of a size, in pixels."""
    return (size, size) if isinstance(size, int) else size


class ShardsConfig(Section):
    """Where a data set is written, and the size of its shards (verbs ``prepare`` and ``generate``)."""

    path: str
    """Folder or URL of the data set."""
    samples_per_shard: int = Field(default=1000, ge=1)
    """Number of images per tar file. For object stores, choose tar files of a few hundred MB."""


class EncodedShardsConfig(ShardsConfig):
    """Where shards of images are written, and how the images are encoded."""

    codec: Literal["png", "webp", "jpeg", "raw"] = "png"
    """File format of the images. ``png``, ``webp`` (smaller, slower to write) and ``raw`` (an array; large, fast to
    read) are lossless; ``jpeg`` is not."""
    jpeg_quality: int = Field(default=95, ge=1, le=100)
    """Quality of ``jpeg``, which is written without chroma subsampling."""


class DataSetConfig(Section):
    """A packed data set to read."""

    path: str
    """Folder or URL that holds ``manifest.json``."""
    verify: Literal["size", "full"] = "size"
    """How the shards are checked before the first step. ``size``: compare their sizes. ``full``: also verify their
    SHA-256. In both cases, the checksum of a sample is verified whenever the sample is read."""


class AugmentationConfig(Section):
    """Random changes of training images. They depend only on (seed, epoch, sample)."""

    flip: bool = False
    """Mirror an image horizontally with probability 1/2."""
    crop_pixels: ImageSize | None = None
    """Size of a random crop, which is then the image size of the model: the side of a square in pixels, or
    ``[height, width]``. None does not crop."""


class MixedDataSetConfig(Section):
    """An additional data set to train on."""

    path: str
    """Folder or URL that holds ``manifest.json``."""
    weight: float = Field(gt=0)
    """Share of the global batch, relative to the weights of the other sets."""


class DataConfig(DataSetConfig):
    """One or more packed data sets to train on; each fills a fixed share of every global batch."""

    weight: float = Field(default=1.0, gt=0)
    """Share of the global batch, relative to the weights in ``mix``."""
    mix: tuple[MixedDataSetConfig, ...] = ()
    """Additional data sets, with the same image shape and classes; for example, generated images."""
    augmentation: AugmentationConfig = AugmentationConfig()
    num_workers: int = Field(default=0, ge=0)
    """Number of processes per rank that read and decode images; 0 uses the process of the rank. It does not affect the
    batches."""
    read_threads: int | None = Field(default=None, ge=0)
    """Number of threads per process that read blocks ahead; None uses 16 for URLs and 0 for local folders."""
    max_corrupt_fraction: float = Field(default=1e-3, ge=0, le=1)
    """Maximum share of corrupt samples. A corrupt sample is replaced by the next one and listed in
    ``quarantine-*.jsonl`` in the run folder. The run stops if more than this share of the samples read so far is
    corrupt; as long as fewer than 10,000 samples were read, the share is computed as if 10,000 had been read."""
    shuffle_block: int = Field(default=16, ge=1)
    """Number of consecutive samples in one read. It affects the order of samples. Larger blocks mean fewer, larger
    reads, but need more memory per rank: global batch / ranks x block x bytes per sample. With reads of about 2 MB an
    object store is as fast as local files; ``--dry-run`` prints the size of a read."""
