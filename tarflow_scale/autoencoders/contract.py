"""What autoencoders have in common: images to a Gaussian over latents, latents to images."""

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from tarflow_scale.config.autoencoder import AutoencoderConfig

__all__ = ["Autoencoder", "LatentGaussian", "from_stored"]


def from_stored(images: UInt8[Tensor, "B K H W"]) -> Float[Tensor, "B K H W"]:
    """Stored pixels as floats on [-1, 1], which autoencoders take."""
    return 2 * images.float() / 255 - 1


class LatentGaussian(NamedTuple):
    """The Gaussian q(z | x) with a diagonal covariance, for a batch.

    Args:
        mean: ``(B, C, h, w)``.
        log_var: logarithm of the variance, ``(B, C, h, w)``; None for an encoder that gives one latent.
    """

    mean: Float[Tensor, "B C h w"]
    log_var: Float[Tensor, "B C h w"] | None

    def at(self, noise: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        """The latent that standard normal noise stands for."""
        return self.mean if self.log_var is None else self.mean + torch.exp(0.5 * self.log_var) * noise

    def widened(self, std: Float[Tensor, " C"]) -> "LatentGaussian":
        """The Gaussian of a latent plus noise of this standard deviation for each channel."""
        variance = std.square()[:, None, None].expand_as(self.mean)
        if self.log_var is not None:
            variance = variance + self.log_var.exp()
        return LatentGaussian(self.mean, variance.log())

    def log_prob(self, z: Float[Tensor, "B C h w"]) -> Float[Tensor, " B"]:
        """Log q(z | x) of latents, in nats.

        Raises:
            ValueError: the encoder gives one latent, which has no density.
        """
        if self.log_var is None:
            raise ValueError("an encoder without a variance has no density of latents; use one with a variance")
        distance = (z - self.mean).square() * torch.exp(-self.log_var)
        return -0.5 * (distance + self.log_var + _LOG_TWO_PI).flatten(1).sum(dim=1)

    def kl(self) -> Float[Tensor, " B"]:
        """KL divergence from a standard normal, in nats.

        Raises:
            ValueError: the encoder gives one latent.
        """
        if self.log_var is None:
            raise ValueError("an encoder without a variance has no KL divergence; use one with a variance")
        return 0.5 * (self.mean.square() + self.log_var.exp() - 1 - self.log_var).flatten(1).sum(dim=1)


_LOG_TWO_PI = 1.8378770664093453


class Autoencoder(nn.Module, ABC):
    """Encodes images ``(B, K, H, W)`` on [-1, 1] as latents ``(B, C, H / f, W / f)``, and decodes them."""

    encoder_parts: ClassVar[tuple[str, ...]] = ("encoder.",)
    """How the names of the encoder's tensors begin; all other tensors have no effect on latents."""
    config: AutoencoderConfig
    factor: int
    """Factor f between the sides of an image and of its latent."""
    num_channels: int
    """Number K of channels of an image."""
    latent_channels: int
    """Number C of channels of a latent."""

    @abstractmethod
    def encode(self, x: Float[Tensor, "B K H W"]) -> LatentGaussian:
        """The latents of images, in the scale of the encoder."""

    @abstractmethod
    def decode(self, z: Float[Tensor, "B C h w"]) -> Float[Tensor, "B K H W"]:
        """The images of latents, mostly on [-1, 1]; values beyond are clipped where images are stored."""

    def log_prob_of_levels(
        self, levels: UInt8[Tensor, "B K H W"], bit_depth: int, z: Float[Tensor, "B C h w"]
    ) -> Float[Tensor, " B"]:
        """Log p(x | z) of the levels of pixels, in nats, computed in float64 from the decoded values.

        Raises:
            ValueError: the autoencoder gives levels no probability.
        """
        del levels, bit_depth, z
        raise ValueError(
            f"levels of pixels need an autoencoder with a distribution of bins, logistic or gaussian (got "
            f"{type(self).__name__} without one); use another autoencoder"
        )

    def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """``(C, h, w)`` of the latent of an image ``(K, H, W)``.

        Raises:
            ValueError: the number of channels or the size does not fit.
        """
        channels, height, width = image_shape
        if channels != self.num_channels:
            raise ValueError(
                f"images must have the autoencoder's {self.num_channels} channels (got {channels}); pack them alike"
            )
        if height % self.factor or width % self.factor:
            raise ValueError(
                f"both sides of an image must be multiples of the autoencoder's factor {self.factor} (got {height}x"
                f"{width}); set source.size_pixels"
            )
        return self.latent_channels, height // self.factor, width // self.factor
