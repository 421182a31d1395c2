"""Builds the model for a data set."""

import torch

from tarflow_scale.autoencoders.contract import Autoencoder
from tarflow_scale.autoencoders.stored import build_autoencoder
from tarflow_scale.capacity.memory import ModelSize
from tarflow_scale.config.autoencoder import ConvolutionalConfig
from tarflow_scale.config.data import ImageSize, height_and_width
from tarflow_scale.config.model import FlowConfig
from tarflow_scale.errors import ConfigError, DataError
from tarflow_scale.flows import Flow, build
from tarflow_scale.shards.manifest import Manifest
from tarflow_scale.training.zero import model_size

__all__ = ["check_images", "flow_of", "seen_by_model", "size_of"]


def flow_of(model: FlowConfig, manifest: Manifest) -> Flow:
    """Build the flow for the sample shape, classes and conditions of a data set."""
    event = manifest.event
    if event.num_conditions is not None:
        return build(model, event.shape, None, event.num_conditions)
    flow = build(model, event.shape, manifest.num_classes or None)
    flow.class_names = manifest.class_names if flow.num_classes else ()
    return flow


def size_of(
    model: FlowConfig | ConvolutionalConfig,
    shape: tuple[int, ...],
    num_classes: int | None = None,
    num_conditions: int | None = None,
) -> ModelSize:
    """Size of the model for samples of this shape; for a flow, with this number of classes or conditions.

    Raises:
        ConfigError: the model does not fit the samples.
    """
    with torch.device("meta"):
        if not isinstance(model, ConvolutionalConfig):
            return model_size(build(model, shape, None if num_conditions else num_classes, num_conditions))
        autoencoder = build_autoencoder(model)
    check_images(autoencoder, shape)
    return model_size(autoencoder)


def check_images(autoencoder: Autoencoder, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Check that an autoencoder can encode samples of this shape, which is returned.

    Raises:
        ConfigError: the samples are not images, or their size or channels do not fit.
    """
    if len(shape) != 3:
        raise ConfigError(f"an autoencoder is for images (got samples of shape {shape}); set data.path to images")
    channels, height, width = shape
    try:
        autoencoder.latent_shape((channels, height, width))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return channels, height, width


def seen_by_model(manifest: Manifest, crop_pixels: ImageSize | None) -> Manifest:
    """The manifest with the image size after cropping, which is the size that the model sees.

    Raises:
        DataError: the crop is larger than the images.
    """
    if crop_pixels is None:
        return manifest
    (rows, columns), (height, width) = map(height_and_width, (crop_pixels, manifest.image_size_pixels))
    if rows > height or columns > width:
        raise DataError(
            f"data.augmentation.crop_pixels must not exceed the image size (got {rows}x{columns} and {height}x"
            f"{width}); lower or remove data.augmentation.crop_pixels"
        )
    return manifest.model_copy(update={"image_size_pixels": crop_pixels})
