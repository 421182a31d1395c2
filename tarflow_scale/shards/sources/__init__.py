"""Sources of images for ``prepare``; `open_source` opens the one that a configuration names."""

from tarflow_scale.config.prepare import SourceConfig, SplitConfig
from tarflow_scale.shards.images import Reading
from tarflow_scale.shards.sources.source import BadImage, ImageSource, ReducedSource, Shaping

__all__ = ["BadImage", "ImageSource", "open_source"]


def open_source(config: SourceConfig, split: SplitConfig | None = None, num_workers: int = 1) -> ImageSource:
    """The source that a configuration names.

    Args:
        config: the configuration.
        split: how the source is divided into splits.
        num_workers: processes that scan a large source.
    """
    source = _whole_source(config, split or SplitConfig(), num_workers)
    if config.bit_depth is None or config.bit_depth == source.bit_depth:
        return source
    return ReducedSource(source, config.bit_depth)


def _whole_source(config: SourceConfig, split: SplitConfig, num_workers: int) -> ImageSource:
    """Modules are imported when they are needed, because scikit-learn and pyarrow are slow to import."""
    reading = Reading(orientation=config.orientation, transparency=config.transparency)
    shaping = Shaping(config.size_pixels, config.resize, config.resample, config.bad_images == "skip", reading)
    path = config.path or ""
    match config.kind:
        case "digits":
            from tarflow_scale.shards.sources.digits import DigitsSource

            return DigitsSource()
        case "folder":
            from tarflow_scale.shards.sources.image_files import FolderSource

            return FolderSource(config, split, shaping)
        case "zip":
            from tarflow_scale.shards.sources.image_files import ZipSource

            return ZipSource(config, split, shaping)
        case "mnist":
            from tarflow_scale.shards.sources.mnist import MnistSource

            return MnistSource(path)
        case "cifar":
            from tarflow_scale.shards.sources.arrays import CifarSource

            return CifarSource(path)
        case "imagenet_npz":
            from tarflow_scale.shards.sources.arrays import DownsampledImageNetSource

            return DownsampledImageNetSource(path)
        case "parquet":
            from tarflow_scale.shards.sources.parquet import ParquetSource

            return ParquetSource(config, split, shaping)
        case "vectors":
            from tarflow_scale.shards.sources.vector_files import VectorSource

            return VectorSource(path, config.label_column, config.condition_columns)
        case "webdataset":
            from tarflow_scale.shards.sources.tars import TarSource

            return TarSource(config, split, shaping, num_workers)
