"""Training of an autoencoder on images, or of the decoder of a registered one."""

import numpy as np
import torch
from torch import Tensor

from tarflow_scale.autoencoders.contract import Autoencoder
from tarflow_scale.autoencoders.stored import (
    AUTOENCODER_FILES,
    autoencoder_files,
    autoencoder_from_files,
    build_autoencoder,
    with_decoder,
)
from tarflow_scale.config.autoencoder import ConvolutionalConfig, TunedDecoderConfig
from tarflow_scale.config.train import TrainingConfig
from tarflow_scale.config.versions import VersionConfig
from tarflow_scale.errors import ConfigError
from tarflow_scale.flows.likelihood import quantize
from tarflow_scale.records import PixelFormat
from tarflow_scale.registry import Registry
from tarflow_scale.runtime.distributed import own_device
from tarflow_scale.shards.events import ImageEvent
from tarflow_scale.shards.images import contact_sheet
from tarflow_scale.shards.manifest import Manifest
from tarflow_scale.shards.reader import ShardSet
from tarflow_scale.training.construction import check_images, size_of
from tarflow_scale.training.reconstruction import ReconstructionObjective
from tarflow_scale.training.validation import NOISE_SEED
from tarflow_scale.training.zero import model_size
from tarflow_scale.verbs.train.subject import Subject

__all__ = ["TrainedAutoencoder"]

_IMAGES, _COLUMNS = 24, 8
_SHEET_PIXELS = 1024
"""About the width of a preview."""


class TrainedAutoencoder(Subject):
    """See the module.

    Args:
        model: the section ``model``.
        manifest: the training data, with the image size that the autoencoder sees.
        training: the section ``training``.
        start: the section ``autoencoder``: the version with the decoder to train.
        shown: the images of previews: held-out images, or training images if there are none.

    Raises:
        ConfigError: the data are not images that fit the autoencoder, or the version to start from is not an
            autoencoder.
        RegistryError: there is no such version.
    """

    next_step = (
        "previews/ of the run folder shows images and their reconstructions; next: run tarflow-scale encode with a "
        "file such as configs/encode/folder.yaml"
    )

    def __init__(
        self,
        model: ConvolutionalConfig | TunedDecoderConfig,
        manifest: Manifest,
        training: TrainingConfig,
        start: VersionConfig | None,
        shown: ShardSet,
    ) -> None:
        event = manifest.event
        if not isinstance(event, ImageEvent):
            raise ConfigError(f"model.kind={model.kind} is for images (got {event}); set data.path to images")
        self.pixels = PixelFormat(bit_depth=event.bit_depth, noise="none")
        self._model, self._shown, self._noise_std = model, shown, training.noise.std
        self._first: dict[str, bytes] = {}
        if isinstance(model, ConvolutionalConfig):
            self.identity, self.lineage, self.counted = {}, {}, model
            self.size = size_of(model, event.shape)
            self._image_shape = event.carried_shape
            return
        assert start is not None
        name, self._first = _registered(start)
        self.identity, self.lineage, self.counted = {"autoencoder": name}, {"started_from": name}, None
        autoencoder = autoencoder_from_files(self._first, name)
        self.size = model_size(autoencoder)
        self._image_shape = check_images(autoencoder, event.shape)

    def objective(self) -> ReconstructionObjective:
        """A new autoencoder, or the registered one."""
        if isinstance(self._model, ConvolutionalConfig):
            return self._around(build_autoencoder(self._model))
        return self._around(autoencoder_from_files(self._first, "the autoencoder").requires_grad_(True))

    def _around(self, autoencoder: Autoencoder) -> ReconstructionObjective:
        weight = self._model.weight_of_kl if isinstance(self._model, ConvolutionalConfig) else None
        return ReconstructionObjective(autoencoder, self._image_shape, self.pixels.bit_depth, weight, self._noise_std)

    def picture(self, weights: dict[str, Tensor]) -> bytes:
        """Pairs of rows: images, and below each its reconstruction from a latent as in training."""
        device = own_device()
        objective = self._around(autoencoder_from_files(self.files(weights), "the preview")).to(device)
        if "latent_scale" in weights:
            objective.latent_scale.copy_(weights["latent_scale"])
        num = min(_IMAGES, self._shown.manifest.num_images) // _COLUMNS * _COLUMNS or _COLUMNS
        batch = self._shown.take(np.arange(num) % self._shown.manifest.num_images)
        height, width = self._image_shape[1:]
        images, noise = objective.inputs(batch, NOISE_SEED, device, training=False)
        assert images is not None
        assert noise is not None
        images = images[:, :, :height, :width]
        with torch.no_grad():
            decoded = objective.model.decode(objective.posterior(images).at(noise))
        pairs = torch.stack([images, quantize(decoded, self.pixels.bit_depth, "nearest")])
        rows = pairs.unflatten(1, (-1, _COLUMNS)).transpose(0, 1).flatten(0, 2)
        return contact_sheet(rows.cpu().numpy(), _COLUMNS, max(1, _SHEET_PIXELS // (_COLUMNS * width)))

    def files(self, weights: dict[str, Tensor]) -> dict[str, bytes]:
        """The files of the autoencoder; a decoder is written beside the encoder that it was trained with."""
        if isinstance(self._model, TunedDecoderConfig):
            return with_decoder(self._first, weights)
        with torch.device("meta"):
            return autoencoder_files(build_autoencoder(self._model), weights)


def _registered(start: VersionConfig) -> tuple[str, dict[str, bytes]]:
    """Name and digest of a registered autoencoder, and its files.

    Raises:
        ConfigError: the version is not an autoencoder.
    """
    registry = Registry(start.path, start.model)
    version = registry.resolve(start.version)
    if version.files.keys() != set(AUTOENCODER_FILES):
        raise ConfigError(
            f"autoencoder must be the version of an autoencoder (got {start.model}@{version.version} with the files "
            f"{', '.join(version.files)}); name a version that train or convert registered as an autoencoder"
        )
    return f"{start.model}@{version.version} {version.weights_digest}", registry.read_files(version)
