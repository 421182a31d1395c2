"""The tiny autoencoder of FLUX.2's latents (taef2 of madebyollin/taesd, MIT): f 8, 32 channels, one latent an image.

Encoder: a 3x3 convolution and a block; then three times a convolution of stride 2 and three blocks; a 3x3 convolution
to the latent. Decoder: 3 tanh(z / 3), a 3x3 convolution, ReLU and three blocks; then three times nearest upsampling, a
convolution and blocks; a 3x3 convolution to pixels. The three blocks beside the latent mix channels by two 1x1
convolutions around a group norm first. Pixels are on [0, 1] inside, on [-1, 1] outside. Layers have the numbers of the
published ``nn.Sequential``, so its files fit.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tarflow_scale.autoencoders.contract import Autoencoder, LatentGaussian
from tarflow_scale.config.autoencoder import TinyConfig

__all__ = ["TinyAutoencoder"]

_GROUPS = 4
_LEVELS = 3
_BLOCKS = 3


class TinyAutoencoder(Autoencoder):
    """See the module."""

    num_channels = 3
    factor = 2**_LEVELS

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config = config
        self.latent_channels = config.latent_channels
        width, latent = config.width, config.latent_channels
        down = [
            layer
            for level in range(_LEVELS)
            for layer in (
                _convolution(width, width, stride=2, bias=False),
                *(_TinyBlock(width, mixes=level == _LEVELS - 1) for _ in range(_BLOCKS)),
            )
        ]
        up = [
            layer
            for level in range(_LEVELS)
            for layer in (
                *(_TinyBlock(width, mixes=level == 0) for _ in range(_BLOCKS)),
                nn.Upsample(scale_factor=2),
                _convolution(width, width, bias=False),
            )
        ]
        self.encoder = nn.Sequential(_convolution(3, width), _TinyBlock(width), *down, _convolution(width, latent))
        self.decoder = nn.Sequential(
            _Bound(), _convolution(latent, width), nn.ReLU(), *up, _TinyBlock(width), _convolution(width, 3)
        )

    def encode(self, x: Float[Tensor, "B 3 H W"]) -> LatentGaussian:
        """The latents; they have no variance."""
        return LatentGaussian(self.encoder((x + 1) / 2), None)

    def decode(self, z: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]:
        """The images."""
        return 2 * self.decoder(z) - 1


class _Bound(nn.Module):
    """Bounds latents smoothly by 3."""

    def forward(self, z: Tensor) -> Tensor:
        return torch.tanh(z / 3) * 3


class _TinyBlock(nn.Module):
    """relu(x + three convolutions of x); with ``mixes``, 1x1 convolutions around a group norm are added to x first."""

    def __init__(self, width: int, mixes: bool = False) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            *(_convolution(width, width), nn.ReLU(), _convolution(width, width), nn.ReLU()), _convolution(width, width)
        )
        self.pool = _mixing(width) if mixes else None

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(self.conv(x) + x)


def _mixing(width: int) -> nn.Sequential:
    inner = 4 * width
    return nn.Sequential(
        nn.Conv2d(width, inner, 1, bias=False),
        nn.GroupNorm(_GROUPS, inner),
        nn.ReLU(inplace=True),
        nn.Conv2d(inner, width, 1, bias=False),
    )


def _convolution(inputs: int, outputs: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=bias)
