"""Configuration of the verb ``convert``."""

from typing import Self

from pydantic import Field, model_validator

from tarflow_scale.config.base import Root, Section
from tarflow_scale.config.data import DataSetConfig
from tarflow_scale.config.train import NoiseConfig
from tarflow_scale.config.verb import Verb
from tarflow_scale.config.versions import RegistryConfig

__all__ = ["VERB", "ConvertConfig", "FlowOutputConfig", "ForeignWeightsConfig", "PublishedAutoencoderConfig"]


class ForeignWeightsConfig(Section):
    """Weights that another project saved (verb ``convert``)."""

    path: str
    """Path or URL of the ``.pth`` file that train.py of apple/ml-tarflow saved."""
    num_channels: int | None = Field(default=None, ge=1)
    """Number of channels of the images; None infers 1 or 3 from the size of a token."""
    noise: NoiseConfig
    """Noise with which the weights were trained. It is not stored in the file, but the file name shows it:
    ``..._0.05.pth`` means ``{kind: gaussian, std: 0.05}``, and ``..._uniform.pth`` means ``{kind: uniform}``."""

    @model_validator(mode="after")
    def _is_of_images(self) -> "ForeignWeightsConfig":
        if self.noise.kind == "none":
            raise ValueError("weights.noise must be uniform or gaussian (got none, which is for vectors); correct it")
        return self


class PublishedAutoencoderConfig(Section):
    """An autoencoder that another project published (verb ``convert``)."""

    path: str
    """Folder or URL (such as ``hf://ORGANISATION/NAME/vae``): an ``AutoencoderKL`` of diffusers, with ``config.json``
    and ``diffusion_pytorch_model.safetensors``; or taef2, with ``taef2_encoder.safetensors`` and
    ``taef2_decoder.safetensors``."""


class FlowOutputConfig(Section):
    """Where the result is written."""

    path: str
    """Folder or URL for its safetensors file and its JSON file."""


class ConvertConfig(Root):
    """Convert a flow of apple/ml-tarflow or an autoencoder to files of this package; with ``registry`` register it."""

    weights: ForeignWeightsConfig | None = None
    autoencoder: PublishedAutoencoderConfig | None = None
    output: FlowOutputConfig
    registry: RegistryConfig | None = None
    data: DataSetConfig | None = None

    @model_validator(mode="after")
    def _registers_with_data(self) -> Self:
        if (self.weights is None) == (self.autoencoder is None):
            given = "neither" if self.weights is None else "both"
            raise ValueError(f"convert takes a flow, weights, or an autoencoder (got {given}); set one of the two")
        if self.autoencoder is not None:
            if self.data is not None:
                raise ValueError(f"data.path is for flows (got {self.data.path}); remove it")
        elif (self.registry is None) != (self.data is None):
            given, missing = ("registry", "data") if self.data is None else ("data", "registry")
            raise ValueError(
                f"registry and data.path must be set together (got {given} without {missing}); set both, because a "
                f"version records the data set that it was trained on"
            )
        return self


VERB = Verb(
    "verbs.convert",
    ConvertConfig,
    "turn weights of apple/ml-tarflow, or a published autoencoder, into a model of this package",
    "tarflow-scale convert configs/convert/afhq256.yaml output.path=flows/afhq256",
)
