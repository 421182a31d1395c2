"""From the latents that a flow draws to images."""

import torch
from jaxtyping import Float
from torch import Tensor

from tarflow_scale.autoencoders.contract import Autoencoder
from tarflow_scale.records import LatentFacts

__all__ = ["Renderer"]

_AT_ONCE = 16
"""Images that are decoded together; the memory of a decoder is that of its largest feature maps."""


class Renderer:
    """Decodes standardised latents; it moves to the device of the latents.

    It is not a module, so that the weights of the autoencoder are not those of the flow that has it.

    Args:
        autoencoder: in evaluation mode.
        latents: the latents of the flow.
    """

    def __init__(self, autoencoder: Autoencoder, latents: LatentFacts) -> None:
        self._autoencoder = autoencoder
        self._latents = latents

    def image_shape(self, latent_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """``(K, H, W)`` of the image of a latent ``(C, h, w)``."""
        factor = self._autoencoder.factor
        return self._autoencoder.num_channels, latent_shape[1] * factor, latent_shape[2] * factor

    @torch.no_grad()
    def __call__(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B K H W"]:
        """Images on about [-1, 1]."""
        decoder = self._autoencoder.to(x.device)
        weight = next(decoder.parameters())
        mean, scale = (
            torch.tensor(values, device=x.device, dtype=torch.float32)[:, None, None]
            for values in (self._latents.mean, self._latents.scale)
        )
        z = (x.float() * scale + mean).to(weight.dtype)
        return torch.cat([decoder.decode(part) for part in z.split(_AT_ONCE)]).to(x.dtype)
