"""Sample indices to images.

Image i depends on (weights, seed, i, guidance, temperature): its latent is counter-based and its label follows from
i. Batch size and thread count change the last bits of a float, hence in rare cases a pixel by one level; whoever
needs equal bytes fixes them, as the generation plan does.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from tarflow_scale.errors import NumericsError
from tarflow_scale.flows import Flow
from tarflow_scale.flows.likelihood import quantize, rounding_of
from tarflow_scale.sampling.latents import balanced_labels, latents

__all__ = ["Sampler"]


class Sampler:
    """Draws images from a flow.

    Args:
        flow: in evaluation mode; its ``pixels`` say how floats become levels.
        seed: seed of the latents.
        batch_size: images decoded together.
        guidance: classifier-free guidance; 0 samples the model's own distribution.
        temperature: standard deviation of the latent.
    """

    def __init__(
        self, flow: Flow, *, seed: int, batch_size: int, guidance: float = 0.0, temperature: float = 1.0
    ) -> None:
        self._flow = flow
        self._seed = seed
        self._batch_size = batch_size
        self._guidance = guidance
        self._temperature = temperature
        self._device = next(flow.parameters()).device

    @torch.no_grad()
    def floats(self, indices: range) -> Iterator[Tensor]:
        """Batches of continuous images ``(b, C, H, W)`` on [-1, 1] and beyond.

        Raises:
            NumericsError: a value is not finite.
        """
        for low in range(0, len(indices), self._batch_size):
            part = indices[low : low + self._batch_size]
            z = self._temperature * latents(self._seed, part, self._flow.num_dims)
            classes = self._flow.num_classes
            y = balanced_labels(part, classes).to(self._device) if classes else None
            x = self._flow.inverse(z.to(self._device), y, self._guidance)
            if not bool(torch.isfinite(x).all()):
                raise NumericsError(
                    f"the model produced values that are not finite (images {part.start} to {part.stop - 1}); check "
                    f"its training, or lower sampling.guidance and sampling.temperature"
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
