"""Load a flow from a registry or a folder, in a notebook or in a worker."""

import json
import os
from collections.abc import Mapping

import torch

from tarflow_scale import storage
from tarflow_scale.autoencoders.contract import Autoencoder
from tarflow_scale.autoencoders.rendering import Renderer
from tarflow_scale.autoencoders.stored import AUTOENCODER_FILES, autoencoder_from_files, digest_of
from tarflow_scale.config.sampling import SamplingConfig
from tarflow_scale.errors import ConfigError, DataError, RegistryError
from tarflow_scale.flows import Flow, TarFlow, load_flow
from tarflow_scale.flows.weights import flow_from_files
from tarflow_scale.records import Calibration
from tarflow_scale.registry import Registry
from tarflow_scale.sampling.calibration import measured_with
from tarflow_scale.sampling.decode import decoder_of

__all__ = [
    "EXPORTED",
    "attach_renderer",
    "calibration_for",
    "load",
    "load_autoencoder",
    "load_version",
    "worker_device",
]

EXPORTED = "version.json"
"""Name of the file that ``models export`` writes beside the flow; it contains the record of the version."""


def load(
    source: str | os.PathLike[str],
    registry: str | os.PathLike[str] | None = None,
    size: tuple[int, int] | None = None,
) -> Flow:
    """Load a flow, in evaluation mode on the CPU.

    Args:
        source: a folder or URL that `save_flow`, ``train`` or ``models export`` wrote; or, with ``registry``,
            ``model@version``, where the version is a number, an alias or ``latest``.
        registry: folder or URL of a registry.
        size: height and width of the images to sample, in pixels, if they differ from those of training; a TarFlow
            with rotary positions supports this.

    Returns:
        The flow, including its class names if they were stored.

    Raises:
        UserError: the flow does not exist or cannot be read, or does not support the size.
    """
    name = os.fspath(source)
    model, separator, reference = name.partition("@")
    if registry is not None:
        if not separator or not reference:
            raise RegistryError(
                f"a version must be given as model@version (got {name!r}); write, for example, digits@champion"
            )
        return _fast(_resized(load_version(os.fspath(registry), model, reference), size))
    if model and reference and "/" not in name and not storage.list_names(name):
        raise RegistryError(
            f"a version must be loaded from a registry (got {name!r} without one); call load({name!r}, registry=PATH)"
        )
    flow = load_flow(name)
    files = {file: storage.join(name, file) for file in AUTOENCODER_FILES if flow.latents is not None}
    attach_renderer(flow, {file: storage.read_bytes(location) for file, location in files.items()}, name)
    if flow.num_classes and not flow.class_names:
        flow.class_names = _exported_names(storage.join(name, EXPORTED))
    return _fast(_resized(flow, size))


def attach_renderer(flow: Flow, files: Mapping[str, bytes], origin: str) -> None:
    """Give a flow on latents the autoencoder that is stored beside it.

    Raises:
        DataError: the autoencoder is missing, or is not the one of the latents.
    """
    if flow.latents is None:
        return
    autoencoder = autoencoder_from_files(files, origin)
    if (digest := digest_of(files)) != flow.latents.autoencoder:
        raise DataError(
            f"{origin} must have the autoencoder of its latents, {flow.latents.autoencoder[:12]} (got {digest[:12]}); "
            f"export it again"
        )
    flow.renderer = Renderer(autoencoder, flow.latents)


def _exported_names(location: str) -> tuple[str, ...]:
    content = storage.read_if_there(location)
    try:
        return () if content is None else tuple(map(str, json.loads(content)["version"]["data"]["class_names"]))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{location} must be a file that 'models export' wrote (got {type(error).__name__} when reading it); "
            f"export the version again"
        ) from error


def _resized(flow: Flow, size: tuple[int, int] | None) -> Flow:
    if size is None or tuple(flow.shown_shape[1:]) == tuple(size):
        return flow
    if not isinstance(flow, TarFlow):
        raise ConfigError(f"size needs a TarFlow with rotary positions (got {type(flow).__name__}); leave size out")
    factor = flow.shown_shape[1] // flow.event_shape[1]
    if size[0] % factor or size[1] % factor:
        raise ConfigError(
            f"both sides of size must be multiples of the autoencoder's factor {factor} (got {size[0]}x{size[1]}); "
            f"change size"
        )
    try:
        return flow.resized(size[0] // factor, size[1] // factor)
    except ValueError as error:
        raise ConfigError(f"size: {error}") from error


def _fast(flow: Flow) -> Flow:
    decoder = decoder_of(flow)
    if decoder is not None:
        flow.decoder = decoder.as_decode
    return flow


def worker_device(gpu: bool) -> torch.device:
    """The device of a worker: its GPU if ``gpu`` is set, otherwise the CPU.

    Raises:
        ConfigError: the worker needs a GPU and the machine has none.
    """
    if gpu and not torch.cuda.is_available():
        raise ConfigError(
            "cluster.gpus_per_worker needs a CUDA device (got none on this machine); set cluster.gpus_per_worker=0"
        )
    return torch.device("cuda" if gpu else "cpu")


def calibration_for(registry: Registry, version: int, settings: SamplingConfig, gpu: bool) -> Calibration | None:
    """Among the decoding calibrations of a version, the newest one for these settings and this kind of device.

    If none matches, returns the newest calibration; the sampler then raises an error that names the difference. Returns
    None if the decoder is exact or the version has no calibration.
    """
    if settings.decoder.kind == "exact":
        return None
    measured = registry.state().calibrations.get(version, [])
    matching = [item for item in measured if measured_with(item, settings) and (item.device != "cpu") == gpu]
    return (matching or measured or [None])[-1]


def load_version(registry: str, model: str, reference: int | str) -> Flow:
    """Load a registered version in evaluation mode on the CPU; every file is verified against its digest."""
    store = Registry(registry, model)
    version = store.resolve(reference)
    class_names = version.trained_on.class_names
    files, origin = store.read_files(version), f"{model}@{version.version}"
    flow = flow_from_files(files, origin)
    attach_renderer(flow, files, origin)
    flow.class_names = class_names if flow.num_classes else ()
    return flow


def load_autoencoder(registry: str, model: str, reference: int | str) -> tuple[Autoencoder, str]:
    """Load a registered autoencoder in evaluation mode on the CPU, and its digest.

    Raises:
        UserError: the version does not exist or is not an autoencoder.
    """
    store = Registry(registry, model)
    version = store.resolve(reference)
    files = store.read_files(version)
    return autoencoder_from_files(files, f"{model}@{version.version}"), digest_of(files)
