"""An autoencoder on disk: ``autoencoder.safetensors`` and ``autoencoder.json``, alone or beside a flow on its latents.

Latents, and flows on them, name the autoencoder by the digest of its configuration and its encoder. Autoencoders that
differ only in the decoder have the same digest, so each of them can decode the latents of the other.

Nothing is pickled. Published weights are read from a folder of diffusers (``config.json`` and one safetensors file), or
from the two files of taef2 (``taef2_encoder.safetensors`` and ``taef2_decoder.safetensors``).
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from tarflow_scale import storage
from tarflow_scale.autoencoders.contract import Autoencoder
from tarflow_scale.autoencoders.convolutional import ConvolutionalAutoencoder
from tarflow_scale.autoencoders.diffusers_kl import DiffusersAutoencoder
from tarflow_scale.autoencoders.tiny import TinyAutoencoder
from tarflow_scale.config.autoencoder import AutoencoderConfig, DiffusersConfig, TinyConfig
from tarflow_scale.errors import DataError
from tarflow_scale.records import canonical_json

__all__ = [
    "AUTOENCODER_FILES",
    "CONFIG_NAME",
    "WEIGHTS_NAME",
    "autoencoder_files",
    "autoencoder_from_files",
    "build_autoencoder",
    "config_from_files",
    "digest_of",
    "read_published",
    "with_decoder",
]

WEIGHTS_NAME = "autoencoder.safetensors"
CONFIG_NAME = "autoencoder.json"
AUTOENCODER_FILES = CONFIG_NAME, WEIGHTS_NAME
_FORMAT = 1
_KINDS: dict[str, type[Any]] = {
    "autoencoder": ConvolutionalAutoencoder,
    "tiny": TinyAutoencoder,
    "diffusers": DiffusersAutoencoder,
}
_TINY = {"encoder": "taef2_encoder.safetensors", "decoder": "taef2_decoder.safetensors"}
_DIFFUSERS = "config.json", "diffusion_pytorch_model.safetensors"


def build_autoencoder(config: AutoencoderConfig) -> Autoencoder:
    """A new autoencoder with random weights."""
    return _KINDS[config.kind](config)


def autoencoder_files(autoencoder: Autoencoder, weights: dict[str, Tensor] | None = None) -> dict[str, bytes]:
    """The files of an autoencoder, keyed by file name; ``weights``, keyed by name, replace its weights."""
    tensors = weights if weights is not None else autoencoder.state_dict()
    settings = {"format": _FORMAT, "autoencoder": autoencoder.config.model_dump(mode="json")}
    return {WEIGHTS_NAME: _saved(tensors), CONFIG_NAME: canonical_json(settings)}


def with_decoder(files: Mapping[str, bytes], weights: Mapping[str, Tensor]) -> dict[str, bytes]:
    """The files of an autoencoder with other weights; the bytes of the encoder and of the configuration stay.

    Args:
        files: the files of the autoencoder.
        weights: new weights by name; names that the autoencoder does not have are ignored.
    """
    tensors = load_tensors(files[WEIGHTS_NAME])
    parts = _encoder_parts(files)
    tensors |= {name: weights[name] for name in tensors if name in weights and not name.startswith(parts)}
    return {WEIGHTS_NAME: _saved(tensors), CONFIG_NAME: files[CONFIG_NAME]}


def _saved(tensors: Mapping[str, Tensor]) -> bytes:
    return save_tensors({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()})


def _encoder_parts(files: Mapping[str, bytes]) -> tuple[str, ...]:
    return _KINDS[json.loads(files[CONFIG_NAME])["autoencoder"]["kind"]].encoder_parts


def autoencoder_from_files(files: Mapping[str, bytes], origin: str) -> Autoencoder:
    """Rebuild an autoencoder, in evaluation mode on the CPU.

    Raises:
        DataError: a file is missing or damaged, or the weights do not fit the configuration.
        ConfigError: the autoencoder needs a package that is not installed.
    """
    config = config_from_files(files, origin)
    try:
        return _filled(config, load_tensors(files[WEIGHTS_NAME]))
    except (KeyError, ValueError, SafetensorError, RuntimeError) as error:
        raise _unusable(origin, error) from error


def config_from_files(files: Mapping[str, bytes], origin: str) -> AutoencoderConfig:
    """The configuration of an autoencoder; only the file `CONFIG_NAME` is needed.

    Raises:
        DataError: the file is missing or damaged.
    """
    try:
        settings: dict[str, Any] = json.loads(files[CONFIG_NAME])
        return TypeAdapter(AutoencoderConfig).validate_python(settings["autoencoder"])
    except (KeyError, ValueError, TypeError) as error:
        raise _unusable(origin, error) from error


def _unusable(origin: str, error: Exception) -> DataError:
    reason = " ".join(str(error).split())
    return DataError(f"{origin} does not hold an autoencoder ({reason}); export or convert it again")


def _filled(config: AutoencoderConfig, tensors: dict[str, Tensor]) -> Autoencoder:
    """An autoencoder with these weights in fp32.

    Raises:
        ValueError: a weight is not finite.
        RuntimeError: the weights do not fit.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"weights must be finite (got others in {name})")
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        autoencoder = build_autoencoder(config)
    autoencoder.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return autoencoder.eval().requires_grad_(False)


def digest_of(files: Mapping[str, bytes]) -> str:
    """SHA-256 of the configuration and the encoder of an autoencoder, which latents and flows on them name."""
    parts = _encoder_parts(files)
    encoder = {name: tensor for name, tensor in load_tensors(files[WEIGHTS_NAME]).items() if name.startswith(parts)}
    digests = {CONFIG_NAME: storage.digest(files[CONFIG_NAME]), "encoder": storage.digest(save_tensors(encoder))}
    return storage.digest(canonical_json(digests))


def read_published(path: str) -> Autoencoder:
    """Read published weights from a folder or URL: of diffusers, or of taef2.

    Raises:
        DataError: the folder holds neither, or a file is damaged.
        ConfigError: diffusers is not installed.
    """
    names = set(storage.list_names(path))
    if names.issuperset(_TINY.values()):
        config: AutoencoderConfig = TinyConfig()
        parts = {part: _tensors(path, name) for part, name in _TINY.items()}
        tensors = {f"{part}.{name}": tensor for part, of_part in parts.items() for name, tensor in of_part.items()}
    elif names.issuperset(_DIFFUSERS):
        config_name, weights_name = _DIFFUSERS
        config = _diffusers_config(storage.join(path, config_name))
        tensors = {f"inner.{name}": tensor for name, tensor in _tensors(path, weights_name).items()}
    else:
        raise DataError(
            f"{path} must hold an autoencoder (got no {' and '.join(_DIFFUSERS)}, nor {' and '.join(_TINY.values())}); "
            f"choose the folder of its weights"
        )
    try:
        return _filled(config, tensors)
    except (ValueError, RuntimeError) as error:
        raise DataError(f"{path} does not fit its configuration ({' '.join(str(error).split())})") from error


def _diffusers_config(location: str) -> DiffusersConfig:
    try:
        return DiffusersConfig(settings=json.loads(storage.read_bytes(location)))
    except (ValueError, ValidationError) as error:
        raise DataError(f"{location} is not a configuration of diffusers ({error}); download it again") from error


def _tensors(path: str, name: str) -> dict[str, Tensor]:
    location = storage.join(path, name)
    try:
        return load_tensors(storage.read_bytes(location))
    except SafetensorError as error:
        raise DataError(f"{location} is not a safetensors file ({error}); download it again") from error
