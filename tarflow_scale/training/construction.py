"""Builds the flow for a data set."""

from tarflow_scale.config.data import ImageSize, height_and_width
from tarflow_scale.config.model import ModelConfig
from tarflow_scale.errors import DataError
from tarflow_scale.flows import Flow, build
from tarflow_scale.shards.manifest import Manifest

__all__ = ["flow_of", "seen_by_model"]


def flow_of(model: ModelConfig, manifest: Manifest) -> Flow:
    """Build the flow for the sample shape, classes and conditions of a data set."""
    event = manifest.event
    if event.num_conditions is not None:
        return build(model, event.shape, None, event.num_conditions)
    flow = build(model, event.shape, manifest.num_classes or None)
    flow.class_names = manifest.class_names if flow.num_classes else ()
    return flow


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
