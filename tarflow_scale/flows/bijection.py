"""The contract every flow keeps: an exact bijection between data and a standard normal.

Shapes: B batch, D = prod(event_shape) dimensions, K classes. Units: nats per sample, summed over dimensions. Images
live on [-1, 1]; whatever prior a model learns is folded into ``z`` and ``log_det``, so that one temperature and one
bits/dim formula serve the whole family.

A model implements `Bijection.encode` and `Bijection.decode`; what all models share around them is here, and what users
do with a model is in `tarflow_scale.flows.flow`. ``forward`` and ``inverse`` check shapes only, which costs nothing.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tarflow_scale.config.model import Activations, Capabilities, ModelConfig
from tarflow_scale.config.sampling import Guidance
from tarflow_scale.flows.conditions import (
    Condition,
    GivenCondition,
    as_condition,
    check_condition,
    check_count,
    is_transformed,
)
from tarflow_scale.flows.dequantization import Dequantizer
from tarflow_scale.flows.inputs import check_shape
from tarflow_scale.flows.logits import from_logits, to_logits
from tarflow_scale.records import LatentFacts, PixelFormat

__all__ = ["Bijection", "Decode"]

Decode = Callable[[Tensor, Condition, Guidance | None], Tensor]
"""What `Flow.decode` does: latents, labels, and guidance that has an effect or None, to data."""


class Rendering(Protocol):
    """Turns latents ``(B, C, h, w)`` into images; see `tarflow_scale.autoencoders.rendering`."""

    image_shape: tuple[int, int, int]

    def __call__(self, x: Tensor) -> Tensor:
        """Images on about [-1, 1]."""
        ...


class Bijection(nn.Module, ABC):
    """A normalizing flow ``x <-> z`` with exact log-determinant.

    A model implements `encode` and `decode`; what all models share around them is here. Its configuration declares its
    ``capabilities``.

    Args:
        event_shape: shape of one sample, ``(C, H, W)`` for images.
        num_classes: number of classes the flow is conditioned on; None for an unconditional flow.
        logit_alpha: the data passes `to_logits` first; None leaves it on [-1, 1].
    """

    capabilities = Capabilities()

    def __init__(self, event_shape: tuple[int, ...], num_classes: int | None, logit_alpha: float | None) -> None:
        super().__init__()
        self.logit_alpha = logit_alpha
        self.event_shape = event_shape
        self.num_classes = num_classes
        self.num_conditions: int | None = None
        """Numbers that the flow is conditioned on in place of a label; `build` sets it."""
        self.num_dims = math.prod(event_shape)
        self._activations: Activations = "keep"
        self.config: ModelConfig | None = None
        """The configuration the flow was built from; saved with the weights."""
        self.decoder: Callable[[Callable[[float], object]], Decode] | None = None
        """Returns the function that `sample` uses in place of `decode`, which reports its progress in samples;
        `tarflow_scale.load` sets it to the fast decoder of a model."""
        self.pixels: PixelFormat | None = None
        """How the training images were quantised and noised; needed to turn samples back into pixels."""
        self.dequantizer: Dequantizer | None = None
        """Maps uniform noise of images to learned noise in the same bins; `build` sets it. None keeps it."""
        self.latents: LatentFacts | None = None
        """The latents of an autoencoder that are the events; None for pixels and vectors."""
        self.renderer: Rendering | None = None
        """Turns events that are latents into images; `tarflow_scale.load` sets it."""
        self.class_names: tuple[str, ...] = ()
        """Names of the classes, by which labels may be given; `tarflow_scale.load` sets them from the registry."""

    def forward(
        self,
        x: Float[Tensor, "B ..."],
        y: GivenCondition = None,
        *,
        dequantize: bool = False,
        twice: bool = False,
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, " B"]]:
        """Map data ``x (B, *event)`` to ``z (B, D)`` and ``log_det (B,)`` = log|det dz/dx| in nats.

        With ``dequantize``, ``x`` are images under uniform noise, which passes the flow's `dequantizer` first if it has
        one: both are then those of the dequantized images, and ``log_det`` is less by log q of their noise. ``twice``
        selects `encode_twice`.

        Raises:
            ValueError: data or labels of another shape, or images to dequantize whose depth is not known.
        """
        self.check_shape(x)
        labels = self._labels(y, len(x), x.device)
        check_count(labels, len(x), self.num_conditions)
        if not dequantize or self.dequantizer is None:
            return self._encode_data(x, labels, twice)
        x, log_q = self.dequantizer(x, self._bit_depth())
        z, log_det = self._encode_data(x, labels, twice)
        return z, log_det - log_q.flatten(1).sum(dim=1)

    def _encode_data(self, x: Tensor, y: Condition, twice: bool) -> tuple[Tensor, Tensor]:
        encode = self.encode_twice if twice else self.encode
        if self.logit_alpha is None:
            return encode(x, y)
        with torch.autocast(x.device.type, enabled=False):
            h, logit_log_det = to_logits(x, self.logit_alpha)
        z, log_det = encode(h, y)
        return z, log_det + logit_log_det

    def _labels(self, y: GivenCondition, num: int, device: torch.device) -> Condition:
        return as_condition(y, num, self.class_names, device)

    def _bit_depth(self) -> int:
        if self.pixels is None:
            raise ValueError(
                "dequantization needs the depth of the images (got a flow without a pixel format); train or load it "
                "through the pipeline"
            )
        return self.pixels.bit_depth

    def inverse(
        self,
        z: Float[Tensor, "B D"],
        y: GivenCondition = None,
        guidance: Guidance | None = None,
        decode: Decode | None = None,
    ) -> Float[Tensor, "B ..."]:
        """Map ``z (B, D)`` back to ``x (B, *event)``; exact when ``guidance`` is None or its scale 0.

        ``decode`` takes the place of `decode`; `tarflow_scale.sampling` has faster ones.

        Raises:
            ValueError: latents or labels of another shape, or guidance that cannot have an effect.
        """
        if tuple(getattr(z, "shape", ()))[1:] != (self.num_dims,):
            got = tuple(z.shape) if hasattr(z, "shape") else type(z).__name__
            raise ValueError(f"latents must have shape (batch, {self.num_dims}) (got {got}); pass one for each value")
        labels = self._labels(y, len(z), z.device)
        check_count(labels, len(z), self.num_conditions)
        h = (decode or self.decode)(z, labels, guidance if self.is_guided(labels, guidance) else None)
        return h if self.logit_alpha is None else from_logits(h, self.logit_alpha)

    def inverse_and_log_det(
        self, z: Float[Tensor, "B D"], y: GivenCondition = None
    ) -> tuple[Float[Tensor, "B ..."], Float[Tensor, " B"]]:
        """`inverse`, and log|det dx/dz| ``(B,)`` in nats; models that compute both in one pass override this."""
        x = self.inverse(z, y)
        return x, -self(x, y)[1]

    def diagnostics(self) -> dict[str, float]:
        """Figures of the latest `forward` for the training log; most flows have none."""
        return {}

    @property
    def activations(self) -> Activations:
        """How the backward pass gets its activations; changes memory and time, never a result.

        Setting it raises ValueError where the model does not support it. Under torch.func activations are always kept.
        """
        return "keep" if is_transformed() else self._activations

    @activations.setter
    def activations(self, how: Activations) -> None:
        self.check_activations(how)
        self._activations = how

    def check_activations(self, how: Activations) -> None:
        """Raise ValueError where the model does not support this choice."""
        if how not in self.capabilities.activations:
            choices = ", ".join(self.capabilities.activations)
            raise ValueError(f"activations of {type(self).__name__} must be one of {choices} (got {how}); choose one")

    @abstractmethod
    def encode(self, h: Tensor, y: Condition) -> tuple[Tensor, Tensor]:
        """The model itself: ``h (B, *event)`` to ``z (B, D)`` and log-determinant ``(B,)``."""

    def encode_twice(self, h: Tensor, y: Condition) -> tuple[Tensor, Tensor]:
        """`encode` with operations that all have second derivatives and forward-mode derivatives."""
        return self.encode(h, y)

    @abstractmethod
    def decode(self, z: Float[Tensor, "B D"], y: Condition, guidance: Guidance | None) -> Tensor:
        """Inverse of `encode`; ``guidance`` is None or has an effect."""

    def initialize(self, x: Tensor, y: Condition = None) -> None:
        """Data-dependent initialisation of a fresh flow; all ranks must call, each with its part of one batch.

        Flows that need none do nothing.
        """

    @property
    def divides_surprise(self) -> bool:
        """Whether this flow supports `nats_of_values` in its present configuration."""
        return True

    def encode_values(self, h: Tensor, y: Condition) -> tuple[Tensor, Tensor]:
        """As `encode`, latents and log-determinants in the shape of ``h``; for models that mix no values.

        Raises:
            ValueError: this model mixes them.
        """
        del h, y
        raise ValueError(f"{type(self).__name__} mixes values, so they have no latents of their own; use another model")

    def check_shape(self, x: Tensor) -> None:
        """Raise ValueError when images have another shape than this flow's."""
        check_shape(x, self.event_shape)

    def check_labels(self, y: Condition, batch_size: int) -> None:
        """Raise ValueError when labels or conditions do not fit this flow (host-side, for the edges of the API)."""
        check_condition(y, batch_size, self.num_classes, self.num_conditions)

    def is_guided(self, y: Condition, guidance: Guidance | None) -> bool:
        """Whether sampling needs a second, weak prediction.

        Raises:
            ValueError: guidance that cannot have an effect, because there is no label to drop.
        """
        if guidance is None or guidance.scale == 0:
            return False
        if not self.capabilities.guidance:
            raise ValueError(f"{type(self).__name__} has no guidance (got scale={guidance.scale}); set it to 0")
        if guidance.attention_temperature == 1.0:
            if self.num_classes is None:
                raise ValueError(
                    f"guidance of a flow without classes needs attention_temperature other than 1 (got "
                    f"scale={guidance.scale}); set it, or the scale to 0"
                )
            if y is None:
                raise ValueError(f"guidance needs labels (got y=None and scale={guidance.scale}); pass them")
        return True
