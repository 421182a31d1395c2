"""The data sets of a run, opened and checked against the model."""

from dataclasses import dataclass

from tarflow_scale.autoencoders.stored import AUTOENCODER_FILES, digest_of
from tarflow_scale.config.data import AugmentationConfig, DataConfig
from tarflow_scale.config.model import ModelConfig
from tarflow_scale.config.train import TrainingConfig, ValidationConfig
from tarflow_scale.config.versions import VersionConfig
from tarflow_scale.errors import ConfigError
from tarflow_scale.records import PixelFormat
from tarflow_scale.registry import Registry
from tarflow_scale.shards.events import ImageEvent
from tarflow_scale.shards.manifest import Manifest
from tarflow_scale.shards.mix import Mix, open_mix
from tarflow_scale.training.construction import seen_by_model
from tarflow_scale.training.validation import Validation

__all__ = ["Inputs", "open_inputs"]


@dataclass(frozen=True)
class Inputs:
    """The data sets of a run.

    Args:
        mix: the training data.
        manifest: manifest of the training data, with the image size that the model sees.
        pixels: how stored pixels are converted to floats.
        validation: held-out data, or None.
        autoencoder: files of the autoencoder of the latents; empty for images and vectors.
    """

    mix: Mix
    manifest: Manifest
    pixels: PixelFormat
    validation: Validation | None
    autoencoder: dict[str, bytes]


def open_inputs(
    data: DataConfig,
    validation: ValidationConfig | None,
    model: ModelConfig,
    training: TrainingConfig,
    autoencoder: VersionConfig | None,
) -> Inputs:
    """Open the data sets.

    Raises:
        DataError: a data set cannot be read, or validation and training images differ in kind.
        ConfigError: the settings do not fit the kind of data.
    """
    mix = open_mix(data, training.global_batch_size, training.seed)
    manifest = seen_by_model(mix.manifest, data.augmentation.crop_pixels)
    _check_event(manifest, model, training, data.augmentation)
    noise = training.noise
    pixels = PixelFormat(bit_depth=manifest.bit_depth, noise=noise.kind, noise_std=noise.std)
    held_out = validation and Validation.open(
        validation,
        like=manifest,
        data_path=data.path,
        batch_size=training.micro_batch_size,
        pixels=pixels,
        conditional=model.class_conditional,
    )
    return Inputs(mix, manifest, pixels, held_out, _autoencoder_files(autoencoder, manifest))


def _autoencoder_files(autoencoder: VersionConfig | None, manifest: Manifest) -> dict[str, bytes]:
    """The files of the autoencoder that made the latents; none for images and vectors.

    Raises:
        ConfigError: the section is missing or has no effect, or names another autoencoder.
    """
    latents = manifest.latents
    if (autoencoder is None) != (latents is None):
        missing = f"add the section autoencoder for {manifest.event}" if autoencoder is None else "remove it"
        raise ConfigError(
            f"the section autoencoder is for latents and required for them (got {manifest.event}); {missing}"
        )
    if autoencoder is None or latents is None:
        return {}
    registry = Registry(autoencoder.path, autoencoder.model)
    version = registry.resolve(autoencoder.version)
    files = {name: content for name, content in registry.read_files(version).items() if name in AUTOENCODER_FILES}
    if files.keys() != set(AUTOENCODER_FILES) or digest_of(files) != latents.autoencoder:
        raise ConfigError(
            f"autoencoder must be the one that made the latents, {latents.autoencoder[:12]} (got {autoencoder.model}@"
            f"{version.version}); name that version"
        )
    return files


def _check_event(
    manifest: Manifest, model: ModelConfig, training: TrainingConfig, augmentation: AugmentationConfig
) -> None:
    """Check that noise, augmentation and conditions fit the kind of data.

    Raises:
        ConfigError: one of them does not fit.
    """
    noise, event = training.noise.kind, manifest.event
    if noise not in event.noises:
        right = " or ".join(event.noises)
        raise ConfigError(f"training.noise.kind must be {right} for {event} (got {noise}); change training.noise.kind")
    if not isinstance(event, ImageEvent) and augmentation.crop_pixels is not None:
        raise ConfigError(
            f"data.augmentation.crop_pixels needs images (got {event.noun}); remove data.augmentation.crop_pixels"
        )
    if augmentation.flip and not event.can_flip:
        raise ConfigError(
            f"data.augmentation.flip needs images, or latents that encode wrote with encoding.mirrored=true (got "
            f"{event}); remove data.augmentation.flip"
        )
    if event.num_conditions is None or not model.class_conditional:
        return
    if manifest.num_classes:
        raise ConfigError(
            f"a flow must be conditioned on labels or on numbers, not on both (got {manifest.num_classes} classes and "
            f"{event.num_conditions} numbers in {manifest.name}); pack the data set without labels or without numbers"
        )
    if training.label_drop > 0:
        raise ConfigError(
            f"training.label_drop must be 0 for a flow that is conditioned on numbers, because numbers cannot be "
            f"dropped (got {training.label_drop:g}); set training.label_drop=0"
        )
