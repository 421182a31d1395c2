"""Configuration of the verb ``encode``."""

from typing import Literal

from pydantic import Field

from tarflow_scale.config.base import Root, Section
from tarflow_scale.config.cluster import ClusterConfig
from tarflow_scale.config.verb import Verb
from tarflow_scale.config.versions import VersionConfig

__all__ = ["VERB", "EncodeConfig", "EncodingConfig", "ImagesConfig", "LatentShardsConfig"]


class ImagesConfig(Section):
    """The images to encode."""

    path: str
    """Folder or URL of a packed data set: one split, or the folder that ``prepare`` wrote with all of its splits."""


class EncodingConfig(Section):
    """How images become latents."""

    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Type of the stored means and log-variances."""
    mirrored: bool = False
    """Store the latent of the mirrored image, too, so that ``data.augmentation.flip`` can be used in training."""
    batch_size: int = Field(default=16, ge=1)
    """Images that are encoded together. Smaller batches are filled up, so that it alone decides the last bits."""


class LatentShardsConfig(Section):
    """Where latents are written."""

    path: str
    """Folder or URL. Its splits and shards have the names of those of the images."""


class EncodeConfig(Root):
    """Encode packed images as latents of a registered autoencoder. Run again, it encodes only what is missing."""

    registry: VersionConfig
    data: ImagesConfig
    encoding: EncodingConfig = EncodingConfig()
    shards: LatentShardsConfig
    cluster: ClusterConfig = ClusterConfig()


VERB = Verb(
    "verbs.encode.driver",
    EncodeConfig,
    "turn packed images into latents of an autoencoder, on Ray",
    "tarflow-scale encode configs/encode/folder.yaml data.path=data/mine shards.path=data/mine-latents",
    imports="PyTorch",
)
