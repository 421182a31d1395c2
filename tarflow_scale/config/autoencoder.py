"""Autoencoders: one class for each kind, as `tarflow_scale.config.model` has one for each kind of flow."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from tarflow_scale.config.base import Section
from tarflow_scale.config.model import Capabilities

__all__ = ["AutoencoderConfig", "ConvolutionalConfig", "DiffusersConfig", "TinyConfig", "TunedDecoderConfig"]

_TRAINED = Capabilities(vectors=False, activations=("keep",), guidance=False, separate_networks=False)


_MOST_WIDENED = 4


class ConvolutionalConfig(Section):
    """A convolutional autoencoder that ``train`` trains; see `tarflow_scale.autoencoders.convolutional`."""

    OMITTED_AT_DEFAULT: ClassVar[frozenset[str]] = frozenset({"kl_weight"})
    capabilities: ClassVar[Capabilities] = _TRAINED
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
    """Standard deviation of the Gaussian q(z | x). ``learned``: the encoder predicts it for each value. ``fixed``: it
    is ``posterior_std`` everywhere (SimFlow, arXiv 2512.04084)."""
    posterior_std: float = Field(default=0.5, gt=0)
    """Standard deviation of a ``fixed`` posterior."""
    kl_weight: float | None = Field(default=None, ge=0)
    """Weight of the KL divergence of q(z | x) from a standard normal in the loss. At 1 the loss is a bound on the
    negative log-likelihood; a smaller weight keeps more details of the image in the latent. None means 1 for a
    ``learned`` and 0 for a ``fixed`` posterior."""
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
        if self.posterior == "learned" and self.posterior_std != type(self).model_fields["posterior_std"].default:
            raise ValueError(f"posterior_std has no effect on posterior=learned (got {self.posterior_std}); remove it")
        return self

    @property
    def widths(self) -> list[int]:
        """Channels of each level."""
        return [self.width * min(2**level, _MOST_WIDENED) for level in range(self.factor.bit_length())]

    @property
    def weight_of_kl(self) -> float:
        """Weight of the KL divergence in the loss."""
        return float(self.posterior == "learned") if self.kl_weight is None else self.kl_weight


class TunedDecoderConfig(Section):
    """The decoder of a registered autoencoder, which ``train`` trains further while the encoder stays as it is.

    The section ``autoencoder`` selects the version to start from. The result has the same encoder, so it decodes the
    latents and the flows of that version. ``training.noise`` is the noise of the latents that the decoder is trained
    on; choose that of a flow, whose samples have this noise.
    """

    capabilities: ClassVar[Capabilities] = _TRAINED
    kind: Literal["decoder"] = "decoder"
    """Selects the training of a decoder; required."""


class TinyConfig(Section):
    """The tiny autoencoder of FLUX.2's latents (taef2); see `tarflow_scale.autoencoders.tiny`."""

    bins: ClassVar[None] = None
    """None: this autoencoder defines no distribution of pixels."""
    kind: Literal["tiny"] = "tiny"
    """Selects this autoencoder; required."""
    latent_channels: int = Field(default=32, ge=1)
    """Number of channels of a latent."""
    width: int = Field(default=64, ge=4)
    """Channels of every layer between pixels and latent."""


class DiffusersConfig(Section):
    """An ``AutoencoderKL`` of the package diffusers; see `tarflow_scale.autoencoders.diffusers_kl`."""

    bins: ClassVar[None] = None
    """None: this autoencoder defines no distribution of pixels."""
    kind: Literal["diffusers"] = "diffusers"
    """Selects this autoencoder; required."""
    settings: dict[str, Any]
    """Content of the ``config.json`` that diffusers wrote."""


AutoencoderConfig = Annotated[ConvolutionalConfig | TinyConfig | DiffusersConfig, Field(discriminator="kind")]
"""An autoencoder."""
