"""Autoencoders: one class for each kind, as `tarflow_scale.config.model` has one for each kind of flow."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from tarflow_scale.config.base import Section

__all__ = ["AutoencoderConfig", "ConvolutionalConfig", "DiffusersConfig", "TinyConfig"]


class ConvolutionalConfig(Section):
    """A convolutional autoencoder that ``train`` trains; see `tarflow_scale.autoencoders.convolutional`."""

    kind: Literal["autoencoder"] = "autoencoder"
    """Selects this autoencoder; required."""
    num_channels: int = Field(default=3, ge=1)
    """Channels of an image."""
    factor: int = Field(ge=2)
    """Factor f between the sides of an image and of its latent; a power of 2."""
    latent_channels: int = Field(ge=1)
    """Number of channels of a latent."""
    width: int = Field(default=64, ge=8)
    """Channels of the first level; a multiple of 8. Each level doubles them, up to four times the width."""
    blocks: int = Field(default=2, ge=1)
    """Number of residual blocks of each level."""
    posterior: Literal["learned", "fixed"] = "learned"
    """Deviation of the Gaussian q(z | x). ``learned``: by the encoder, for each value. ``fixed``: ``posterior_std``, so
    that the loss needs no weight of the KL term when a flow is trained together with the encoder (SimFlow)."""
    posterior_std: float = Field(default=0.5, gt=0)
    """Deviation of a ``fixed`` posterior."""
    likelihood: Literal["logistic", "gaussian", "laplace"] = "logistic"
    """Distribution of a pixel around the decoded value, with a learned scale for each channel. ``logistic`` and
    ``gaussian`` give each level of a pixel a probability. ``laplace`` is a density, whose loss is an L1 distance."""

    @property
    def bins(self) -> Literal["logistic", "gaussian"] | None:
        """The distribution of pixels, if it gives each level of a pixel a probability."""
        return None if self.likelihood == "laplace" else self.likelihood

    @model_validator(mode="after")
    def _fits(self) -> "ConvolutionalConfig":
        if self.factor & (self.factor - 1):
            raise ValueError(f"factor must be a power of 2 (got {self.factor}); choose 2, 4, 8 or 16")
        if self.width % 8:
            raise ValueError(f"width must be a multiple of 8 (got {self.width}); change it")
        return self


class TinyConfig(Section):
    """The tiny autoencoder of FLUX.2's latents (taef2); see `tarflow_scale.autoencoders.tiny`."""

    bins: ClassVar[None] = None
    """It has no distribution of pixels."""
    kind: Literal["tiny"] = "tiny"
    """Selects this autoencoder; required."""
    latent_channels: int = Field(default=32, ge=1)
    """Number of channels of a latent."""
    width: int = Field(default=64, ge=4)
    """Channels of every layer between pixels and latent."""


class DiffusersConfig(Section):
    """An ``AutoencoderKL`` of the package diffusers; see `tarflow_scale.autoencoders.diffusers_kl`."""

    bins: ClassVar[None] = None
    """It has no distribution of pixels."""
    kind: Literal["diffusers"] = "diffusers"
    """Selects this autoencoder; required."""
    settings: dict[str, Any]
    """Content of the ``config.json`` that diffusers wrote."""


AutoencoderConfig = Annotated[ConvolutionalConfig | TinyConfig | DiffusersConfig, Field(discriminator="kind")]
"""An autoencoder."""
