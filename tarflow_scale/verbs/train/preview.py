"""Previews of a run: samples drawn with the averaged weights, or the density of a flow of 2-d vectors."""

import warnings

import torch
from torch import Tensor

from tarflow_scale import storage
from tarflow_scale.config.model import ModelConfig
from tarflow_scale.config.sampling import Guidance, SamplingConfig
from tarflow_scale.density.picture import density_picture
from tarflow_scale.errors import ConfigError, NumericsError
from tarflow_scale.flows import Flow
from tarflow_scale.loading import attach_renderer
from tarflow_scale.sampling import Sampler
from tarflow_scale.shards.events import ImageEvent
from tarflow_scale.shards.images import contact_sheet
from tarflow_scale.shards.manifest import Manifest
from tarflow_scale.training.construction import flow_of
from tarflow_scale.training.loop import Preview
from tarflow_scale.verbs.train.inputs import Inputs

__all__ = ["preview_of"]

_IMAGES = 40
_ZOOM = 4


def preview_of(inputs: Inputs, model: ModelConfig, folder: str, guidance: float, device: torch.device) -> Preview:
    """Return a function that writes ``<folder>/previews/images-<images seen>.png``.

    The function builds a copy of the flow with the averaged weights. With up to 40 classes, each column of samples
    shows one class. If sampling fails, the function only warns, so that the run continues.
    """
    manifest = inputs.manifest

    def draw(weights: dict[str, Tensor], images_seen: int) -> None:
        with torch.device("meta"):
            flow = flow_of(model, manifest)
        flow.load_state_dict({name: weight.to(device) for name, weight in weights.items()}, assign=True)
        flow.pixels, flow.latents = inputs.pixels, manifest.latents
        attach_renderer(flow, inputs.autoencoder, "the autoencoder")
        try:
            flow.eval()
            picture = (
                _samples(flow, manifest, guidance) if isinstance(manifest.event.shown, ImageEvent) else _density(flow)
            )
        except (NumericsError, ConfigError) as error:
            warnings.warn(f"no preview at {images_seen} images: {error}", stacklevel=2)
            return
        if picture is not None:
            storage.write_bytes(f"{folder}/previews/images-{images_seen:012d}.png", picture)

    return draw


def _samples(flow: Flow, manifest: Manifest, guidance: float) -> bytes:
    columns = manifest.num_classes if 0 < manifest.num_classes <= _IMAGES else 8
    sampler = Sampler(flow, 0, SamplingConfig(batch_size=None, guidance=Guidance(scale=guidance)))
    images = sampler.images(range(_IMAGES // columns * columns)).numpy()
    names = [manifest.class_names[i % columns] for i in range(len(images))] if flow.num_classes else None
    return contact_sheet(images, columns, _ZOOM, names)


def _density(flow: Flow) -> bytes | None:
    """A picture of the density; None if the flow does not have two dimensions or is conditioned on numbers."""
    if flow.event_shape != (2,) or flow.num_conditions is not None:
        return None
    try:
        return density_picture(flow)
    except ValueError as error:
        raise NumericsError(str(error)) from error
