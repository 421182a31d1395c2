"""Between images and the standardised latents of a flow."""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from tarflow_scale.autoencoders.contract import Autoencoder, LatentGaussian, from_stored
from tarflow_scale.records import LatentFacts

__all__ = ["Renderer"]

_AT_ONCE = 16
"""Images that are decoded together; the memory of a decoder is that of its largest feature maps."""


class Renderer:
    """Decodes standardised latents, and encodes images as such; it moves to the device of its input.

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
        z, decoder = self._decoder_input(x), self._autoencoder
        return torch.cat([decoder.decode(part) for part in z.split(_AT_ONCE)]).to(x.dtype)

    @torch.no_grad()
    def posterior(self, images: UInt8[Tensor, "B K H W"], noise_std: float) -> LatentGaussian:
        """The Gaussian of the standardised latents of stored pixels with independent noise, in float64.

        With mean m and deviation s by the encoder, and mean and scale of each channel, it is
        N((m - mean) / scale, (s / scale)^2 + noise_std^2), because the noise is added to standardised latents.

        Raises:
            ValueError: the encoder gives one latent, which has no density.
        """
        weight = next(self._autoencoder.to(images.device).parameters())
        x = from_stored(images).to(weight.dtype)
        means: list[Tensor] = []
        log_vars: list[Tensor] = []
        for part in x.split(_AT_ONCE):
            latent = self._autoencoder.encode(part)
            if latent.log_var is None:
                raise ValueError("an encoder without a variance has no density of latents; use one with a variance")
            means.append(latent.mean)
            log_vars.append(latent.log_var)
        mean, scale = self._mean_and_scale(images.device, torch.float64)
        latent = LatentGaussian(torch.cat(means).double(), torch.cat(log_vars).double())
        centre, log_var = latent.widened(noise_std * scale.flatten())
        assert log_var is not None
        return LatentGaussian((centre - mean) / scale, log_var - 2 * scale.log())

    @torch.no_grad()
    def log_prob_of_levels(
        self, levels: UInt8[Tensor, "B K H W"], bit_depth: int, x: Float[Tensor, "B C h w"]
    ) -> Float[Tensor, " B"]:
        """Log p(image | latent) for standardised latents; see `Autoencoder.log_prob_of_levels`."""
        parts = zip(levels.split(_AT_ONCE), self._decoder_input(x).split(_AT_ONCE), strict=True)
        return torch.cat([self._autoencoder.log_prob_of_levels(image, bit_depth, z) for image, z in parts])

    def _decoder_input(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        """Latents in the scale of the encoder; the autoencoder moves to their device."""
        weight = next(self._autoencoder.to(x.device).parameters())
        wide = torch.promote_types(x.dtype, torch.float32)
        mean, scale = self._mean_and_scale(x.device, wide)
        return (x.to(wide) * scale + mean).to(weight.dtype)

    def _mean_and_scale(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Mean and scale of each channel, ``(C, 1, 1)``."""
        mean, scale = (
            torch.tensor(values, device=device, dtype=dtype)[:, None, None]
            for values in (self._latents.mean, self._latents.scale)
        )
        return mean, scale
