"""Sample indices to images.

Image i depends on (weights, seed, i, sampling settings): its latent is counter-based and its label follows from i.
Batch size and thread count change the last bits of a float, hence in rare cases a pixel by one level; whoever needs
equal bytes fixes them, as the generation plan does.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from tarflow_scale.config import SamplingConfig
from tarflow_scale.errors import ConfigError, NumericsError
from tarflow_scale.flows import Flow
from tarflow_scale.flows.likelihood import quantize, rounding_of
from tarflow_scale.sampling.latents import balanced_labels, latents

__all__ = ["Sampler"]


class Sampler:
    """Draws images from a flow.

    Args:
        flow: in evaluation mode; its ``pixels`` say how floats become levels.
        seed: seed of the latents.
        settings: the section ``sampling``.

    Raises:
        ConfigError: settings that cannot have an effect on this flow.
    """

    def __init__(self, flow: Flow, seed: int, settings: SamplingConfig) -> None:
        try:
            flow.is_guided(balanced_labels(range(1), flow.num_classes) if flow.num_classes else None, settings.guidance)
        except ValueError as error:
            raise ConfigError(f"sampling.guidance: {error}") from error
        noise = flow.pixels.noise if flow.pixels else "unknown"
        if settings.denoise > 0 and noise != "gaussian":
            raise ConfigError(
                f"sampling.denoise needs a model trained with Gaussian noise (got {settings.denoise:g} for {noise} "
                f"noise); set it to 0"
            )
        self._flow = flow
        self._seed = seed
        self._settings = settings
        self._device = next(flow.parameters()).device

    @torch.no_grad()
    def floats(self, indices: range) -> Iterator[Tensor]:
        """Batches of continuous images ``(b, C, H, W)`` on [-1, 1] and beyond.

        Raises:
            NumericsError: a value is not finite.
        """
        settings, classes = self._settings, self._flow.num_classes
        for low in range(0, len(indices), settings.batch_size):
            part = indices[low : low + settings.batch_size]
            z = settings.temperature * latents(self._seed, part, self._flow.num_dims)
            y = balanced_labels(part, classes).to(self._device) if classes else None
            x = self._flow.inverse(z.to(self._device), y, settings.guidance)
            if settings.denoise > 0:
                assert self._flow.pixels is not None
                x = self._flow.denoised(x, y, self._flow.pixels.noise_std, settings.denoise)
            if not bool(torch.isfinite(x).all()):
                raise NumericsError(
                    f"the model produced values that are not finite (images {part.start} to {part.stop - 1}); check "
                    f"its training, or lower sampling.guidance.scale and sampling.temperature"
                )
            yield x

    def images(self, indices: range) -> Tensor:
        """Stored pixels ``(len(indices), C, H, W)`` uint8, quantised as the training noise asks, on the CPU.

        Raises:
            ValueError: when the flow does not know its pixel format.
            NumericsError: a value is not finite.
        """
        pixels = self._flow.pixels
        if pixels is None:
            raise ValueError("this flow does not know its pixel format; train or load it through the pipeline")
        rounding = rounding_of(pixels)
        return torch.cat([quantize(x, pixels.bit_depth, rounding).cpu() for x in self.floats(indices)])
