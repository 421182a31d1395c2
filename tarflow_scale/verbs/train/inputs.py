"""The data sets of a run, and what it trains on them."""

from dataclasses import dataclass

from tarflow_scale.config.data import DataConfig
from tarflow_scale.config.model import FlowConfig
from tarflow_scale.config.train import LoggingConfig, Recipe, ValidationConfig
from tarflow_scale.config.versions import VersionConfig
from tarflow_scale.shards.manifest import Manifest
from tarflow_scale.shards.mix import Mix, open_mix
from tarflow_scale.training.construction import seen_by_model
from tarflow_scale.training.validation import Validation
from tarflow_scale.verbs.train.autoencoders import TrainedAutoencoder
from tarflow_scale.verbs.train.flows import TrainedFlow
from tarflow_scale.verbs.train.subject import Subject

__all__ = ["Inputs", "open_inputs"]


@dataclass(frozen=True)
class Inputs:
    """The data sets of a run, and what it trains.

    Args:
        mix: the training data.
        manifest: manifest of the training data, with the image size that the model sees.
        validation: held-out data, or None.
        subject: what the run trains.
    """

    mix: Mix
    manifest: Manifest
    validation: Validation | None
    subject: Subject


def open_inputs(
    data: DataConfig,
    validation: ValidationConfig | None,
    recipe: Recipe,
    logging: LoggingConfig,
    autoencoder: VersionConfig | None,
) -> Inputs:
    """Open the data sets, and read the autoencoder from the registry.

    Raises:
        UserError: a data set or the autoencoder cannot be read, validation and training images differ in kind, or the
            settings do not fit the kind of data.
    """
    model, training, augmentation = recipe.model, recipe.training, data.augmentation
    mix = open_mix(data, training.global_batch_size, training.seed)
    manifest = seen_by_model(mix.manifest, augmentation.crop_pixels)
    held_out = validation and Validation.open(
        validation, like=manifest, data_path=data.path, batch_size=training.micro_batch_size
    )
    if isinstance(model, FlowConfig):
        activations, guidance = recipe.parallelism.activations, logging.preview_guidance
        subject = TrainedFlow(model, manifest, training, augmentation, activations, guidance, autoencoder)
    else:
        shown = held_out.shards if held_out else mix.parts[0].shards
        subject = TrainedAutoencoder(model, manifest, training, autoencoder, shown)
    return Inputs(mix, manifest, held_out, subject)
