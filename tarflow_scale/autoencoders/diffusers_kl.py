"""``AutoencoderKL`` of the package diffusers, such as the autoencoder of Stable Diffusion: f 8, 4 to 16 channels.

The package is imported when such an autoencoder is built. Latents keep the scale of the encoder: the factor in the
published configuration is not applied, because `encode` measures the mean and scale of each channel.
"""

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tarflow_scale.autoencoders.contract import Autoencoder, LatentGaussian
from tarflow_scale.config.autoencoder import DiffusersConfig
from tarflow_scale.errors import ConfigError, needs_package

__all__ = ["DiffusersAutoencoder"]

_LOG_VAR_BOUNDS = -30.0, 20.0
"""Bounds of log-variances in diffusers' ``DiagonalGaussianDistribution``."""


class DiffusersAutoencoder(Autoencoder):
    """See the module.

    Raises:
        ConfigError: diffusers is not installed, or the settings are not those of an ``AutoencoderKL``.
    """

    encoder_parts: ClassVar[tuple[str, ...]] = ("inner.encoder.", "inner.quant_conv.")

    def __init__(self, config: DiffusersConfig) -> None:
        super().__init__()
        self.config = config
        settings = config.settings
        if settings.get("_class_name") != "AutoencoderKL":
            raise ConfigError(
                f"an autoencoder of diffusers must be an AutoencoderKL (got {settings.get('_class_name')}); choose "
                f"another folder"
            )
        self.inner: Any = _class().from_config({**settings})
        self.factor = 2 ** (len(settings["block_out_channels"]) - 1)
        self.num_channels, self.latent_channels = settings["in_channels"], settings["latent_channels"]

    def encode(self, x: Float[Tensor, "B K H W"]) -> LatentGaussian:
        """The latents."""
        moments = self.inner.encode(x).latent_dist.parameters
        mean, log_var = torch.chunk(moments, 2, dim=1)
        return LatentGaussian(mean, log_var.clamp(*_LOG_VAR_BOUNDS))

    def decode(self, z: Float[Tensor, "B C h w"]) -> Float[Tensor, "B K H W"]:
        """The images."""
        return self.inner.decode(z, return_dict=False)[0]


def _class() -> Any:
    try:
        from diffusers import AutoencoderKL  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(needs_package("an AutoencoderKL", "diffusers", "latents")) from error
    return AutoencoderKL
