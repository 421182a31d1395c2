"""The contract of every flow: an exact bijection between data and a standard normal.

Shapes: B batch, D = prod(event_shape) dimensions, K classes. Units: nats per sample, summed over dimensions. Images
live on [-1, 1]. A learned prior is part of the map: ``z`` and ``log_det`` include it, so one temperature and one
bits/dim formula hold for all flows.

A model implements `Bijection.encode` and `Bijection.decode`. This module adds the code that all models share, and
`tarflow_scale.flows.flow` adds the methods for users. ``forward`` and ``inverse`` check shapes but not values.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

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
from tarflow_scale.flows.recompute import checkpoint
from tarflow_scale.records import LatentFacts, PixelFormat

__all__ = ["Bijection", "Decode"]

Decode = Callable[[Tensor, Condition, Guidance | None], Tensor]
"""A function like `Bijection.decode`: it maps latents, labels and guidance (None if it has no effect) to data."""


class Rendering(Protocol):
    """Turns latents ``(B, C, h, w)`` into images; see `tarflow_scale.autoencoders.rendering`."""

    def image_shape(self, latent_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """``(K, H, W)`` of the image of a latent ``(C, h, w)``."""
        ...

    def __call__(self, x: Tensor) -> Tensor:
        """Images on about [-1, 1]."""
        ...


class Bijection(nn.Module, ABC):
    """A normalizing flow ``x <-> z`` with exact log-determinant.

    A model implements `encode` and `decode`; its configuration declares its ``capabilities``.

    Args:
        event_shape: shape of one sample, ``(C, H, W)`` for images.
        num_classes: number of classes that the flow is conditioned on; None for an unconditional flow.
        logit_alpha: parameter of `to_logits`, which transforms the data first; None leaves the data on [-1, 1].
    """

    capabilities = Capabilities()

    def __init__(self, event_shape: tuple[int, ...], num_classes: int | None, logit_alpha: float | None) -> None:
        super().__init__()
        self.logit_alpha = logit_alpha
        self.event_shape = event_shape
        self.num_classes = num_classes
        self.num_conditions: int | None = None
        """Length of the condition vector that replaces the label; None if there is no such vector. `build` sets it."""
        self.num_dims = math.prod(event_shape)
        self._activations: Activations = "keep"
        self.config: ModelConfig | None = None
        """The configuration that the flow was built from; it is saved with the weights."""
        self.decoder: Callable[[Callable[[float], object]], Decode] | None = None
        """If set, `sample` decodes with the function that ``decoder(advance)`` returns, not with `decode`. The callback
        ``advance`` updates the progress bar. `tarflow_scale.load` sets ``decoder`` to a fast decoder."""
        self.pixels: PixelFormat | None = None
        """Bit depth and noise of the training images; needed to convert samples to pixels. None if unknown."""
        self.dequantizer: Dequantizer | None = None
        """Maps uniform noise of images to learned noise in the same bins; `build` sets it. None keeps uniform noise."""
        self.latents: LatentFacts | None = None
        """The latents of an autoencoder that are the events; None for pixels and vectors."""
        self.renderer: Rendering | None = None
        """Turns events that are latents into images; `tarflow_scale.load` sets it."""
        self.class_names: tuple[str, ...] = ()
        """Names of the classes, which may be used as labels; `tarflow_scale.load` reads them from the registry."""

    def forward(
        self,
        x: Float[Tensor, "B ..."],
        y: GivenCondition = None,
        *,
        dequantize: bool = False,
        twice: bool = False,
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, " B"]]:
        """Map data ``x (B, *event)`` to ``z (B, D)`` and ``log_det (B,)`` = log|det dz/dx| in nats.

        With ``dequantize``, ``x`` are images with uniform noise. The flow's `dequantizer`, if it has one, transforms
        that noise first, and log q of the new noise is subtracted from ``log_det``. ``twice`` selects `encode_twice`.

        Raises:
            ValueError: the data or labels have the wrong shape, or the dequantizer needs a bit depth that is unknown.
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
                "dequantization needs the bit depth of the images (got a flow without a pixel format); train it "
                "with tarflow-scale, or load it with tarflow_scale.load"
            )
        return self.pixels.bit_depth

    def inverse(
        self,
        z: Float[Tensor, "B D"],
        y: GivenCondition = None,
        guidance: Guidance | None = None,
        decode: Decode | None = None,
    ) -> Float[Tensor, "B ..."]:
        """Map ``z (B, D)`` back to ``x (B, *event)``; exact when ``guidance`` is None or its scale is 0.

        The argument ``decode`` replaces the method `decode`, for example by a faster one of `tarflow_scale.sampling`.

        Raises:
            ValueError: the latents or labels have the wrong shape, or the guidance does not fit; see `is_guided`.
        """
        if tuple(getattr(z, "shape", ()))[1:] != (self.num_dims,):
            got = tuple(z.shape) if hasattr(z, "shape") else type(z).__name__
            raise ValueError(
                f"latents must have shape (batch, {self.num_dims}) (got {got}); pass one number per dimension of x"
            )
        labels = self._labels(y, len(z), z.device)
        check_count(labels, len(z), self.num_conditions)
        h = (decode or self.decode)(z, labels, guidance if self.is_guided(labels, guidance) else None)
        return h if self.logit_alpha is None else from_logits(h, self.logit_alpha)

    def inverse_and_log_det(
        self, z: Float[Tensor, "B D"], y: GivenCondition = None
    ) -> tuple[Float[Tensor, "B ..."], Float[Tensor, " B"]]:
        """`inverse`, and log|det dx/dz| ``(B,)`` in nats. A model that computes both in one pass overrides this."""
        x = self.inverse(z, y)
        return x, -self(x, y)[1]

    def diagnostics(self) -> dict[str, float]:
        """Statistics of the latest `forward` for the training log, keyed by name; empty for most flows."""
        return {}

    @property
    def activations(self) -> Activations:
        """How the backward pass gets its activations. The choice affects memory and time, but no result.

        Setting an unsupported value raises ValueError. Under torch.func, activations are always kept.
        """
        return "keep" if is_transformed() else self._activations

    @activations.setter
    def activations(self, how: Activations) -> None:
        if how not in self.capabilities.activations:
            choices = ", ".join(self.capabilities.activations)
            raise ValueError(f"activations of {type(self).__name__} must be one of {choices} (got {how}); choose one")
        self._activations = how

    def recomputed(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call ``function(*arguments)``; if activations are checkpointed, the backward pass computes them again."""
        recompute = torch.is_grad_enabled() and self.activations == "checkpoint"
        return checkpoint(function, *arguments) if recompute else function(*arguments)

    @abstractmethod
    def encode(self, h: Tensor, y: Condition) -> tuple[Tensor, Tensor]:
        """Map ``h (B, *event)`` to ``z (B, D)`` and the log-determinant ``(B,)``; each model implements this."""

    def encode_twice(self, h: Tensor, y: Condition) -> tuple[Tensor, Tensor]:
        """`encode`, using only operations that have second derivatives and forward-mode derivatives."""
        return self.encode(h, y)

    @abstractmethod
    def decode(self, z: Float[Tensor, "B D"], y: Condition, guidance: Guidance | None) -> Tensor:
        """Inverse of `encode`; ``guidance`` is None unless it has an effect."""

    def initialize(self, x: Tensor, y: Condition = None) -> None:
        """Initialise a new flow from data. All ranks must call this, each with its part of one batch.

        Flows without data-dependent initialisation do nothing.
        """

    @property
    def divides_surprise(self) -> bool:
        """Whether this flow supports `nats_of_values` in its present configuration."""
        return True

    def encode_values(self, h: Tensor, y: Condition) -> tuple[Tensor, Tensor]:
        """Like `encode`, but return a latent and a log-determinant for every value of ``h``, both in its shape.

        Raises:
            ValueError: this model does not map each value to one latent.
        """
        del h, y
        raise ValueError(
            f"nats of values need a model that maps each value to one latent (got {type(self).__name__}); use another "
            f"model"
        )

    def check_shape(self, x: Tensor) -> None:
        """Raise ValueError if ``x`` does not have the shape of this flow's events."""
        check_shape(x, self.event_shape)

    def check_labels(self, y: Condition, batch_size: int) -> None:
        """Raise ValueError if labels or conditions do not fit. Reading their values synchronizes with the device."""
        check_condition(y, batch_size, self.num_classes, self.num_conditions)

    def is_guided(self, y: Condition, guidance: Guidance | None) -> bool:
        """Whether guidance has an effect.

        Guidance needs a second prediction, either without the label or with weaker attention.

        Raises:
            ValueError: this flow does not support the guidance, or the guidance needs labels.
        """
        if guidance is None or guidance.scale == 0:
            return False
        if not self.capabilities.guidance:
            raise ValueError(
                f"{type(self).__name__} does not support guidance (got scale={guidance.scale}); set the scale to 0"
            )
        if guidance.attention_temperature == 1.0:
            if self.num_classes is None:
                raise ValueError(
                    f"guidance of a flow without classes needs an attention_temperature other than 1 (got 1 and "
                    f"scale={guidance.scale}); set attention_temperature, or set the scale to 0"
                )
            if y is None:
                raise ValueError(f"guidance needs labels (got y=None and scale={guidance.scale}); pass labels as y")
        return True
