"""The objective of autoencoders: the negative of a bound on the log-likelihood of images, with a weight of its KL term.

    loss = E_q[-log p(x | z)] + weight KL(q(z | x) || N(0, 1)),      q(z | x) = N(mean, variance + noise^2)

in nats (Kingma and Welling, arXiv 1312.6114; the weight: Higgins et al., "beta-VAE", ICLR 2017). The expectation is
estimated with one draw. At weight 1 and with levels that have probabilities, the loss is an upper bound of the number
of nats of an image.

If only the decoder is trained, the KL term is constant and has weight 0, and ``noise`` makes the decoder robust to
latents with noise, which a flow that was trained with noise draws. It is a number of standard deviations of each
channel of the latents, the unit in which flows on latents are trained. The deviations are measured on the first batch.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tarflow_scale.autoencoders.contract import Autoencoder, LatentGaussian, from_stored
from tarflow_scale.autoencoders.convolutional import FIRST_SCALE, ConvolutionalAutoencoder
from tarflow_scale.autoencoders.pixels_given_latent import Likelihood, log_bins, log_density
from tarflow_scale.autoencoders.similarity import psnr
from tarflow_scale.config.autoencoder import ConvolutionalConfig
from tarflow_scale.flows.likelihood import to_levels
from tarflow_scale.randomness import Purpose
from tarflow_scale.runtime.distributed import all_reduce_sum
from tarflow_scale.shards.reader import Batch
from tarflow_scale.training.noise import sample_noise
from tarflow_scale.training.objective import MicroBatch, Objective, Values

__all__ = ["ReconstructionObjective"]

_LEAST_SCALE = 1e-6
"""A channel with a smaller standard deviation is constant."""


class ReconstructionObjective(Objective[Autoencoder]):
    """See the module.

    Args:
        autoencoder: the autoencoder.
        image_shape: ``(K, H, W)`` of the images.
        bit_depth: bits of a pixel.
        kl_weight: weight of the KL divergence; None trains only the decoder.
        noise_std: noise of the latents that the decoder is trained on, in standard deviations of each channel.
    """

    latent_scale: Tensor

    def __init__(
        self,
        autoencoder: Autoencoder,
        image_shape: tuple[int, int, int],
        bit_depth: int,
        kl_weight: float | None,
        noise_std: float,
    ) -> None:
        super().__init__(autoencoder, math.prod(image_shape))
        self._latent_shape = autoencoder.latent_shape(image_shape)
        self._bit_depth = bit_depth
        self._kl_weight = kl_weight
        self._noise_std = noise_std
        self._likelihood: Likelihood = "laplace"
        self.log_scale = None
        if isinstance(autoencoder.config, ConvolutionalConfig):
            self._likelihood = autoencoder.config.likelihood
        else:  # published autoencoders have no pixel distribution
            self.log_scale = nn.Parameter(torch.full((autoencoder.num_channels,), math.log(FIRST_SCALE)))
        if kl_weight is None:
            for name, weight in autoencoder.named_parameters():
                weight.requires_grad_(not name.startswith(autoencoder.encoder_parts))
        if noise_std > 0:
            self.register_buffer("latent_scale", torch.ones(autoencoder.latent_channels))

    def inputs(self, batch: Batch, seed: int, device: torch.device, training: bool) -> MicroBatch:
        """Images ``(B, K, H, W)`` uint8, and standard normal noise ``(B, C, h, w)`` that selects their latents."""
        del training
        images = torch.from_numpy(batch.events).to(device, non_blocking=True).contiguous()
        where = batch.epochs, batch.samples, math.prod(self._latent_shape)
        noise = sample_noise("gaussian", seed, *where, device, Purpose.LATENT)
        return images, noise.view(-1, *self._latent_shape)

    def forward(self, images: Tensor, noise: Tensor) -> Float[Tensor, "B 4"]:
        """Loss, nats of the reconstruction, KL divergence in nats (0 without a variance), and PSNR in dB."""
        latent = self.posterior(images)
        decoded = self.model.decode(latent.at(noise)).float()
        with torch.autocast(images.device.type, enabled=False):
            reconstruction = -self._log_prob(images, decoded)
            kl = torch.zeros_like(reconstruction) if latent.log_var is None else latent.kl()
            loss = reconstruction + self._kl_weight * kl if self._kl_weight else reconstruction
            figures = reconstruction, kl, psnr(from_stored(images), decoded)
            return torch.stack([loss, *(figure.detach() for figure in figures)], dim=1)

    def posterior(self, images: Tensor) -> LatentGaussian:
        """The Gaussian q(z | x) of the latents that the decoder is trained on."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._kl_weight is not None):
            mean, log_var = self.model.encode(from_stored(images))
        latent = LatentGaussian(mean.float(), None if log_var is None else log_var.float())
        return latent.widened(self._noise_std * self.latent_scale) if self._noise_std > 0 else latent

    def _log_prob(self, images: Tensor, decoded: Tensor) -> Float[Tensor, " B"]:
        log_scale = self.model.log_scale if isinstance(self.model, ConvolutionalAutoencoder) else self.log_scale
        assert log_scale is not None
        if self._likelihood == "laplace":
            return log_density("laplace", from_stored(images), decoded, log_scale)
        return log_bins(self._likelihood, to_levels(images, self._bit_depth), self._bit_depth, decoded, log_scale)

    def record(self, values: Values | None) -> dict[str, float | None]:
        """The loss; the bound in bits/dim if levels have probabilities; the KL divergence in nats; the PSNR in dB."""
        if values is None:
            return dict.fromkeys(("nats_per_dim", "bits_per_dim", "kl_nats", "psnr_db"))
        loss, reconstruction, kl, decibels = values
        bits = (reconstruction + kl) / (self.num_dims * math.log(2))
        return {
            "nats_per_dim": loss,
            "bits_per_dim": None if self._likelihood == "laplace" else bits,
            "kl_nats": kl,
            "psnr_db": decibels,
        }

    def text(self, values: Values) -> str:
        """The loss and the PSNR."""
        return f"{super().text(values)}, {values[3]:.2f} dB"

    def initialize(self, batch: Batch, micro_batch_size: int, seed: int, device: torch.device) -> None:
        """Measure the standard deviation of each channel of the latents of the first batch."""
        if self._noise_std == 0:
            return
        sums = torch.zeros(3, len(self.latent_scale), dtype=torch.float64, device=device)
        for low in range(0, len(batch), micro_batch_size):
            images, _ = self.inputs(batch[low : low + micro_batch_size], seed, device, training=False)
            assert images is not None
            with torch.no_grad():
                mean, log_var = self.model.encode(from_stored(images))
            mean = mean.double()
            squares = mean.square() if log_var is None else mean.square() + log_var.double().exp()
            sums += torch.stack([part.sum(dim=(0, 2, 3)) for part in (torch.ones_like(mean), mean, squares)])
        num, total, squares = all_reduce_sum(sums)
        self.latent_scale.copy_((squares / num - (total / num).square()).clamp(min=_LEAST_SCALE**2).sqrt())
