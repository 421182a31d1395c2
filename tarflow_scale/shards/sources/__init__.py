"""Sources of images and vectors for ``prepare``; `open_source` opens the source that a configuration names."""

from tarflow_scale import storage
from tarflow_scale.config.prepare import SourceConfig, SplitConfig
from tarflow_scale.errors import DataError
from tarflow_scale.shards.sources.source import BadImage, ImageSource

__all__ = ["BadImage", "ImageSource", "open_source"]


def open_source(config: SourceConfig, split: SplitConfig | None = None, num_workers: int = 1) -> ImageSource:
    """Open the source that a configuration names.

    Args:
        config: the source.
        split: how splits are found; None uses the defaults.
        num_workers: number of processes that scan tars.

    Raises:
        DataError: the source is missing, damaged, ambiguous, or has no images.
    """
    source = _source(config, split or SplitConfig(), num_workers)
    source.check_labels()
    if config.bit_depth is not None:
        source.keep_bits(config.bit_depth)
    return source


def _source(config: SourceConfig, split: SplitConfig, num_workers: int) -> ImageSource:
    """Open a source; imports only the module of its kind, because scikit-learn and pyarrow take seconds to import."""
    path = config.path or ""
    if config.kind in ("zip", "mnist", "cifar", "parquet") and not storage.exists(path):
        raise DataError(f"there is no {path}; check source.path")
    match config.kind:
        case "digits":
            from tarflow_scale.shards.sources.digits import DigitsSource

            return DigitsSource()
        case "folder":
            from tarflow_scale.shards.sources.image_files import FolderSource

            return FolderSource(config, split)
        case "zip":
            from tarflow_scale.shards.sources.image_files import ZipSource

            return ZipSource(config, split)
        case "mnist":
            from tarflow_scale.shards.sources.mnist import MnistSource

            return MnistSource(path)
        case "cifar":
            from tarflow_scale.shards.sources.cifar import CifarSource

            return CifarSource(path)
        case "imagenet_npz":
            from tarflow_scale.shards.sources.imagenet import DownsampledImageNetSource

            return DownsampledImageNetSource(path)
        case "parquet":
            from tarflow_scale.shards.sources.parquet import ParquetSource

            return ParquetSource(config, split)
        case "vectors":
            from tarflow_scale.shards.sources.vector_files import VectorSource

            return VectorSource(path, config.label_column, config.condition_columns)
        case "webdataset":
            from tarflow_scale.shards.sources.tars import TarSource

            return TarSource(config, split, num_workers)
