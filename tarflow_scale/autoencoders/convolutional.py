"""A convolutional autoencoder that is trained here: residual blocks on levels of halved size, a Gaussian latent.

Encoder: a 3x3 convolution; for every halving, residual blocks and a convolution of stride 2; residual blocks; a group
norm and a 3x3 convolution to mean and log-variance. The decoder mirrors it, with nearest upsampling before each
convolution. A residual block is x + conv(silu(norm(conv(silu(norm(x)))))), whose last convolution starts at zero.
"""

import math
from itertools import pairwise

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from tarflow_scale.autoencoders.contract import Autoencoder, LatentGaussian
from tarflow_scale.autoencoders.pixels_given_latent import log_bins
from tarflow_scale.config.autoencoder import ConvolutionalConfig

__all__ = ["FIRST_SCALE", "ConvolutionalAutoencoder"]

_GROUP_CHANNELS = 8
"""Channels of a group of the group norms."""
_LOG_VAR_BOUND = 20.0
FIRST_SCALE = 0.1
"""Scale of the pixel distribution before training, on [-1, 1]."""


class ConvolutionalAutoencoder(Autoencoder):
    """See the module."""

    def __init__(self, config: ConvolutionalConfig) -> None:
        super().__init__()
        self.config = config
        self.factor, self.num_channels, self.latent_channels = (
            config.factor,
            config.num_channels,
            config.latent_channels,
        )
        widths = config.widths
        moments = 2 if config.posterior == "learned" else 1
        self._log_var = 2 * math.log(config.posterior_std) if config.posterior == "fixed" else None
        self.encoder = nn.Sequential(
            _convolution(config.num_channels, widths[0]),
            *(
                layer
                for inputs, outputs in pairwise(widths)
                for layer in (*_blocks(inputs, config.blocks), _convolution(inputs, outputs, stride=2))
            ),
            *_blocks(widths[-1], config.blocks),
            *_last(widths[-1], moments * config.latent_channels),
        )
        self.decoder = nn.Sequential(
            _convolution(config.latent_channels, widths[-1]),
            *_blocks(widths[-1], config.blocks),
            *(
                layer
                for outputs, inputs in reversed(list(pairwise(widths)))
                for layer in (
                    nn.Upsample(scale_factor=2),
                    _convolution(inputs, outputs),
                    *_blocks(outputs, config.blocks),
                )
            ),
            *_last(widths[0], config.num_channels),
        )
        self.log_scale = nn.Parameter(torch.full((config.num_channels,), math.log(FIRST_SCALE)))
        """Logarithm of the scale of the pixel distribution, for each channel."""

    def encode(self, x: Float[Tensor, "B K H W"]) -> LatentGaussian:
        """The latents, with the variance that the configuration asks for."""
        moments = self.encoder(x)
        if self._log_var is not None:
            return LatentGaussian(moments, torch.full_like(moments, self._log_var))
        mean, log_var = moments.chunk(2, dim=1)
        return LatentGaussian(mean, log_var.clamp(-_LOG_VAR_BOUND, _LOG_VAR_BOUND))

    def decode(self, z: Float[Tensor, "B C h w"]) -> Float[Tensor, "B K H W"]:
        """The means of the pixel distributions."""
        return self.decoder(z)

    def log_prob_of_levels(
        self, levels: UInt8[Tensor, "B K H W"], bit_depth: int, z: Float[Tensor, "B C h w"]
    ) -> Float[Tensor, " B"]:
        """See `Autoencoder.log_prob_of_levels`."""
        bins = self.config.bins
        if bins is None:
            return super().log_prob_of_levels(levels, bit_depth, z)
        return log_bins(bins, levels, bit_depth, self.decode(z).double(), self.log_scale.double())


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            _norm(width), nn.SiLU(), _convolution(width, width), _norm(width), nn.SiLU(), _convolution(width, width)
        )
        last = self.inner[-1]
        assert isinstance(last, nn.Conv2d)
        assert last.bias is not None
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def _blocks(width: int, num: int) -> list[nn.Module]:
    return [_Residual(width) for _ in range(num)]


def _last(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    return _norm(inputs), nn.SiLU(), _convolution(inputs, outputs)


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(width // _GROUP_CHANNELS, width)


def _convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)
