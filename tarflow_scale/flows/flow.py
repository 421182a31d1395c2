"""The contract every flow keeps: an exact bijection between data and a standard normal.

Shapes: B batch, D = prod(event_shape) dimensions. Units: nats per sample, summed over dimensions. Images live on
[-1, 1]; whatever prior a model learns is folded into ``z`` and ``log_det``, so that one temperature and one
bits/dim formula serve the whole family.
"""

import math
from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tarflow_scale.config import ModelConfig
from tarflow_scale.records import PixelFormat

__all__ = ["Condition", "Flow", "standard_normal_log_prob"]

Condition = Tensor | None
"""Labels ``(B,)`` int64 in [0, num_classes), -1 where the label is dropped; or None, which drops all of them."""


def standard_normal_log_prob(z: Float[Tensor, "B D"]) -> Float[Tensor, " B"]:
    """Log density of ``z`` under N(0, I), in nats, summed over D in fp32 or wider."""
    z = z.float() if z.dtype in (torch.bfloat16, torch.float16) else z
    return -0.5 * (z.square() + math.log(2 * math.pi)).sum(dim=1)


class Flow(nn.Module, ABC):
    """A normalizing flow ``x <-> z`` with exact log-determinant.

    Args:
        event_shape: shape of one sample, ``(C, H, W)`` for images.
        num_classes: number of classes the flow is conditioned on; None for an unconditional flow.
    """

    def __init__(self, event_shape: tuple[int, ...], num_classes: int | None) -> None:
        super().__init__()
        self.event_shape = event_shape
        self.num_classes = num_classes
        self.num_dims = math.prod(event_shape)
        self.config: ModelConfig | None = None
        """The configuration the flow was built from; saved with the weights."""
        self.pixels: PixelFormat | None = None
        """How the training images were quantised and noised; needed to turn samples back into pixels."""

    @abstractmethod
    def forward(self, x: Tensor, y: Condition = None) -> tuple[Tensor, Tensor]:
        """Map data ``x (B, *event)`` to ``z (B, D)`` and ``log_det (B,)`` = log|det dz/dx| in nats."""

    @abstractmethod
    def inverse(self, z: Float[Tensor, "B D"], y: Condition = None, guidance: float = 0.0) -> Tensor:
        """Map ``z (B, D)`` back to ``x (B, *event)``; exact when ``guidance`` is 0."""

    def log_prob(self, x: Tensor, y: Condition = None) -> Float[Tensor, " B"]:
        """Log density of ``x (B, *event)``, in nats of the continuous density."""
        z, log_det = self(x, y)
        return standard_normal_log_prob(z) + log_det

    @torch.no_grad()
    def sample(
        self,
        num: int,
        y: Condition = None,
        temperature: float = 1.0,
        guidance: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw ``num`` samples ``(num, *event)``; the latent is scaled by ``temperature``.

        For images that depend on (seed, index) alone, whatever the batch, use `tarflow_scale.sampling`.

        Raises:
            ValueError: labels that do not fit this flow.
        """
        self.check_labels(y, num)
        reference = next(self.parameters())
        z = torch.randn(num, self.num_dims, generator=generator, dtype=reference.dtype, device=reference.device)
        return self.inverse(temperature * z, y, guidance)

    def check_labels(self, y: Condition, batch_size: int) -> None:
        """Raise ValueError when labels do not fit this flow (host-side check, for the edges of the API)."""
        if y is None:
            return
        if self.num_classes is None:
            raise ValueError("this flow takes no labels (it was built with num_classes=None); pass y=None")
        if y.shape != (batch_size,):
            raise ValueError(f"labels must have shape ({batch_size},) (got {tuple(y.shape)}); pass one per sample")
        low, high = int(y.min()), int(y.max())
        if low < -1 or high >= self.num_classes:
            bad = low if low < -1 else high
            raise ValueError(
                f"labels must be in [0, {self.num_classes}) or -1 for dropped (got {bad}); check the labels"
            )
