"""Training of a flow: on images, vectors, or the latents of a registered autoencoder."""

import torch
from torch import Tensor

from tarflow_scale.autoencoders.stored import AUTOENCODER_FILES, digest_of
from tarflow_scale.config.data import AugmentationConfig
from tarflow_scale.config.model import Activations, FlowConfig
from tarflow_scale.config.sampling import Guidance, SamplingConfig
from tarflow_scale.config.train import TrainingConfig
from tarflow_scale.config.versions import VersionConfig
from tarflow_scale.density.picture import density_picture
from tarflow_scale.errors import ConfigError, NumericsError
from tarflow_scale.flows import Flow
from tarflow_scale.flows.weights import flow_files
from tarflow_scale.loading import attach_renderer
from tarflow_scale.records import LatentFacts, PixelFormat
from tarflow_scale.registry import Registry
from tarflow_scale.runtime.distributed import own_device
from tarflow_scale.sampling import Sampler
from tarflow_scale.shards.events import ImageEvent
from tarflow_scale.shards.images import contact_sheet
from tarflow_scale.shards.manifest import Manifest
from tarflow_scale.training.construction import flow_of, size_of
from tarflow_scale.training.objective import FlowObjective
from tarflow_scale.verbs.train.subject import Subject

__all__ = ["TrainedFlow"]

_IMAGES = 40
_ZOOM = 4


class TrainedFlow(Subject):
    """See the module.

    Args:
        model: the section ``model``.
        manifest: the training data, with the image size that the flow sees.
        training: the section ``training``.
        augmentation: the section ``data.augmentation``.
        activations: how the backward pass gets activations.
        guidance: guidance scale of previews.
        autoencoder: the section ``autoencoder``.

    Raises:
        ConfigError: the settings do not fit the kind of data.
    """

    next_step = (
        "samples are in previews/ of the run folder; next: run tarflow-scale evaluate with a file such as "
        "configs/evaluate/folder.yaml"
    )

    def __init__(
        self,
        model: FlowConfig,
        manifest: Manifest,
        training: TrainingConfig,
        augmentation: AugmentationConfig,
        activations: Activations,
        guidance: float,
        autoencoder: VersionConfig | None,
    ) -> None:
        _check_event(manifest, model, training, augmentation)
        noise = training.noise
        self.counted = model
        self.pixels = PixelFormat(bit_depth=manifest.bit_depth, noise=noise.kind, noise_std=noise.std)
        self.identity, self.lineage = {}, {}
        self._model, self._manifest = model, manifest
        self._activations: Activations = activations
        self._label_drop, self._latent_norm_weight = training.label_drop, training.latent_norm_weight
        self._guidance = guidance
        self._autoencoder = _autoencoder_files(autoencoder, manifest)
        event = manifest.event
        self.size = size_of(model, event.shape, manifest.num_classes or None, event.num_conditions)

    def objective(self) -> FlowObjective:
        """A new flow."""
        return FlowObjective(self._flow(), self._model.class_conditional, self._label_drop, self._latent_norm_weight)

    def _flow(self) -> Flow:
        flow = flow_of(self._model, self._manifest)
        flow.pixels, flow.activations, flow.latents = self.pixels, self._activations, self._manifest.latents
        return flow

    def picture(self, weights: dict[str, Tensor]) -> bytes | None:
        """Samples, of which each column shows a class if there are up to 40; or the density of 2-d vectors."""
        device = own_device()
        with torch.device("meta"):
            flow = self._flow()
        flow.load_state_dict({name: weight.to(device) for name, weight in weights.items()}, assign=True)
        attach_renderer(flow, self._autoencoder, "the autoencoder")
        flow.eval()
        return self._samples(flow) if isinstance(self._manifest.event.shown, ImageEvent) else _density(flow)

    def _samples(self, flow: Flow) -> bytes:
        manifest = self._manifest
        columns = manifest.num_classes if 0 < manifest.num_classes <= _IMAGES else 8
        sampler = Sampler(flow, 0, SamplingConfig(batch_size=None, guidance=Guidance(scale=self._guidance)))
        images = sampler.images(range(_IMAGES // columns * columns)).numpy()
        names = [manifest.class_names[i % columns] for i in range(len(images))] if flow.num_classes else None
        return contact_sheet(images, columns, _ZOOM, names)

    def files(self, weights: dict[str, Tensor]) -> dict[str, bytes]:
        """The files of the flow, and those of its autoencoder."""
        with torch.device("meta"):
            flow = self._flow()
        return flow_files(flow, weights) | self._autoencoder


def _density(flow: Flow) -> bytes | None:
    """A picture of the density; None if the flow does not have two dimensions or is conditioned on numbers."""
    if flow.event_shape != (2,) or flow.num_conditions is not None:
        return None
    try:
        return density_picture(flow)
    except ValueError as error:
        raise NumericsError(str(error)) from error


def _autoencoder_files(autoencoder: VersionConfig | None, manifest: Manifest) -> dict[str, bytes]:
    """The files of an autoencoder that decodes the latents; none for images and vectors.

    Raises:
        ConfigError: the section is missing or has no effect, or the encoder of this version did not make the latents.
    """
    latents = manifest.latents
    if (autoencoder is None) != (latents is None):
        missing = f"add the section autoencoder for {manifest.event}" if autoencoder is None else "remove it"
        raise ConfigError(
            f"the section autoencoder is for latents and required for them (got {manifest.event}); {missing}"
        )
    if autoencoder is None or latents is None:
        return {}
    return _files_of_encoder(autoencoder, latents)


def _files_of_encoder(autoencoder: VersionConfig, latents: LatentFacts) -> dict[str, bytes]:
    registry = Registry(autoencoder.path, autoencoder.model)
    version = registry.resolve(autoencoder.version)
    files = {name: content for name, content in registry.read_files(version).items() if name in AUTOENCODER_FILES}
    if files.keys() != set(AUTOENCODER_FILES) or digest_of(files) != latents.autoencoder:
        raise ConfigError(
            f"autoencoder must be the one that made the latents, {latents.autoencoder[:12]}, or one with the same "
            f"encoder (got {autoencoder.model}@{version.version}); name that version"
        )
    return files


def _check_event(
    manifest: Manifest, model: FlowConfig, training: TrainingConfig, augmentation: AugmentationConfig
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
