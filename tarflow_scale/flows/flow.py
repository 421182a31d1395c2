"""The contract every flow keeps: an exact bijection between data and a standard normal.

Shapes: B batch, D = prod(event_shape) dimensions, K classes. Units: nats per sample, summed over dimensions. Images
live on [-1, 1]; whatever prior a model learns is folded into ``z`` and ``log_det``, so that one temperature and one
bits/dim formula serve the whole family.

``forward`` and ``inverse`` check shapes only, which costs nothing; ``log_prob`` and ``sample`` are the edge of the
API and look at values too.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from tarflow_scale import telemetry
from tarflow_scale.config import Guidance, ModelConfig
from tarflow_scale.flows.conditions import Condition, check_condition, check_count
from tarflow_scale.flows.dequantization import Dequantizer
from tarflow_scale.flows.latents import latents
from tarflow_scale.flows.likelihood import quantize, rounding_of
from tarflow_scale.flows.logits import from_logits, logit_log_dets, to_logits
from tarflow_scale.flows.normal import standard_normal_log_prob, standard_normal_nats
from tarflow_scale.records import PixelFormat

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "Activations",
    "Decode",
    "Flow",
]

Decode = Callable[[Tensor, Condition, Guidance | None], Tensor]
"""What `Flow.decode` does: latents, labels, and guidance that has an effect or None, to data."""

Activations = Literal["keep", "checkpoint", "rebuild"]
"""What the backward pass does for activations: keep them, compute them again from kept inputs of layers, or rebuild
them from outputs by inverting layers."""


class Flow(nn.Module, ABC):
    """A normalizing flow ``x <-> z`` with exact log-determinant.

    A model implements `encode` and `decode`; what all models share around them is here. It names in
    ``activation_choices`` what its backward pass can do.

    Args:
        event_shape: shape of one sample, ``(C, H, W)`` for images.
        num_classes: number of classes the flow is conditioned on; None for an unconditional flow.
        logit_alpha: the data passes `to_logits` first; None leaves it on [-1, 1].
    """

    activation_choices: ClassVar[tuple[Activations, ...]] = ("keep", "checkpoint")
    takes_guidance: ClassVar[bool] = True

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
        """Gives what `sample` uses in place of `decode`, and tells of its progress in samples; `tarflow_scale.load`
        sets it to the fast way of a model."""
        self.pixels: PixelFormat | None = None
        """How the training images were quantised and noised; needed to turn samples back into pixels."""
        self.dequantizer: Dequantizer | None = None
        """Where uniform noise of images goes inside their bins; `build` sets it, None leaves it where it is."""

    def forward(
        self, x: Float[Tensor, "B ..."], y: Condition = None, *, dequantize: bool = False
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, " B"]]:
        """Map data ``x (B, *event)`` to ``z (B, D)`` and ``log_det (B,)`` = log|det dz/dx| in nats.

        With ``dequantize``, ``x`` are images under uniform noise, which passes the flow's `dequantizer` first if it has
        one: both are then those of the dequantised images, and ``log_det`` is less by log q of their noise.

        Raises:
            ValueError: data or labels of another shape, or images to dequantise whose depth is not known.
        """
        self.check_shape(x)
        check_count(y, len(x), self.num_conditions)
        if not dequantize or self.dequantizer is None:
            return self._encode_data(x, y)
        x, log_q = self.dequantizer(x, self._bit_depth())
        z, log_det = self._encode_data(x, y)
        return z, log_det - log_q.flatten(1).sum(dim=1)

    def _encode_data(self, x: Tensor, y: Condition) -> tuple[Tensor, Tensor]:
        if self.logit_alpha is None:
            return self.encode(x, y)
        with torch.autocast(x.device.type, enabled=False):
            h, logit_log_det = to_logits(x, self.logit_alpha)
        z, log_det = self.encode(h, y)
        return z, log_det + logit_log_det

    def _bit_depth(self) -> int:
        if self.pixels is None:
            raise ValueError(
                "dequantisation needs the depth of the images (got a flow without a pixel format); train or load it "
                "through the pipeline"
            )
        return self.pixels.bit_depth

    def inverse(
        self,
        z: Float[Tensor, "B D"],
        y: Condition = None,
        guidance: Guidance | None = None,
        decode: Decode | None = None,
    ) -> Float[Tensor, "B ..."]:
        """Map ``z (B, D)`` back to ``x (B, *event)``; exact when ``guidance`` is None or its scale 0.

        ``decode`` takes the place of `decode`; `tarflow_scale.sampling` has faster ones.

        Raises:
            ValueError: latents or labels of another shape, or guidance that cannot have an effect.
        """
        if z.shape[1] != self.num_dims:
            raise ValueError(
                f"latents must have {self.num_dims} dimensions (got {z.shape[1]}); one a pixel and channel"
            )
        check_count(y, len(z), self.num_conditions)
        h = (decode or self.decode)(z, y, guidance if self.is_guided(y, guidance) else None)
        return h if self.logit_alpha is None else from_logits(h, self.logit_alpha)

    def inverse_and_log_det(
        self, z: Float[Tensor, "B D"], y: Condition = None
    ) -> tuple[Float[Tensor, "B ..."], Float[Tensor, " B"]]:
        """`inverse`, and log|det dx/dz| ``(B,)`` in nats; a model that has both from one pass does better than this."""
        x = self.inverse(z, y)
        return x, -self(x, y)[1]

    def rsample_and_log_prob(
        self, num: int, y: Condition = None, generator: torch.Generator | None = None
    ) -> tuple[Float[Tensor, "B ..."], Float[Tensor, " B"]]:
        """Samples ``(num, *event)`` and their log densities ``(num,)`` in nats, through which gradients pass.

        Raises:
            ValueError: labels that do not fit this flow.
        """
        self.check_labels(y, num)
        reference = next(self.parameters())
        z = torch.randn(num, self.num_dims, generator=generator, dtype=reference.dtype).to(reference.device)
        x, log_det = self.inverse_and_log_det(z, y)
        return x, standard_normal_log_prob(z) - log_det

    def diagnostics(self) -> dict[str, float]:
        """Figures of the latest `forward` that belong into a training log; most flows have none."""
        return {}

    @property
    def activations(self) -> Activations:
        """How the backward pass gets its activations; changes memory and time, never a result.

        Setting it raises ValueError where the model has no such way.
        """
        return self._activations

    @activations.setter
    def activations(self, how: Activations) -> None:
        self.check_activations(how)
        self._activations = how

    def check_activations(self, how: Activations) -> None:
        """Raise ValueError where the model has no such way of the backward pass."""
        if how not in self.activation_choices:
            choices = ", ".join(self.activation_choices)
            raise ValueError(f"activations of {type(self).__name__} must be one of {choices} (got {how}); choose one")

    @abstractmethod
    def encode(self, h: Tensor, y: Condition) -> tuple[Tensor, Tensor]:
        """The model itself: ``h (B, *event)`` to ``z (B, D)`` and log-determinant ``(B,)``."""

    @abstractmethod
    def decode(self, z: Float[Tensor, "B D"], y: Condition, guidance: Guidance | None) -> Tensor:
        """Inverse of `encode`; ``guidance`` is None or has an effect."""

    def initialize(self, x: Tensor, y: Condition = None) -> None:
        """Data-dependent initialisation of a fresh flow; all ranks must call, each with its part of one batch.

        Flows that need none do nothing.
        """

    def log_prob(self, x: Tensor, y: Condition = None) -> Float[Tensor, " B"]:
        """Log density of ``x (B, *event)``, in nats of the continuous density.

        Raises:
            ValueError: images of another shape, values that are not finite, or labels that do not fit this flow.
        """
        self._check_data(x, y)
        z, log_det = self(x, y)
        return standard_normal_log_prob(z) + log_det

    def log_prob_of_images(self, x: Tensor, y: Condition = None) -> Float[Tensor, " B"]:
        """Log density of images under uniform noise ``x (B, C, H, W)``, less log q of the noise if that is learned.

        Without a `dequantizer` it is `log_prob`. With one it is log p(x') - log q(u' | image), where x' is what becomes
        of ``x`` inside its bins. Either way the mean over noise bounds the log probability of the discrete image from
        below, and so does the logarithm of a mean over several draws; see `tarflow_scale.flows.likelihood`.

        Raises:
            ValueError: as `log_prob`, or a depth of pixels that is not known.
        """
        self._check_data(x, y)
        z, log_det = self(x, y, dequantize=True)
        return standard_normal_log_prob(z) + log_det

    def _check_data(self, x: Tensor, y: Condition) -> None:
        self.check_shape(x)
        if not bool(torch.isfinite(x).all()):
            number = int((~torch.isfinite(x)).sum())
            raise ValueError(f"images must be finite (got {number} values that are not); check how they were made")
        self.check_labels(y, len(x))

    @torch.no_grad()
    def nats_of_values(self, x: Tensor, y: Condition = None, *, dequantize: bool = False) -> Tensor:
        """``-log_prob`` divided among the values of each event, in the shape of ``x``: what each adds to its surprise.

        A value's part is the density of its latent under a standard normal, less the logarithm of its own scale. Their
        sum is exact; the division is that of this model, where value and latent keep their places. Where a model mixes
        the values of a place and keeps places, as `MultiScaleFlow` does, a place's part is spread evenly over it. With
        ``dequantize`` it is `log_prob_of_images` that is divided.

        Raises:
            ValueError: a model whose latents mix values.
        """
        self.check_labels(y, len(x))
        log_q: Tensor | float = 0.0
        if dequantize and self.dequantizer is not None:
            x, log_q = self.dequantizer(x, self._bit_depth())
        if self.logit_alpha is None:
            return log_q + self.nats_of_encoded(x, y)
        h, _ = to_logits(x, self.logit_alpha)
        return log_q + self.nats_of_encoded(h, y) - logit_log_dets(h, self.logit_alpha)

    def nats_of_encoded(self, h: Tensor, y: Condition) -> Tensor:
        """`nats_of_values` of what `encode` takes.

        Raises:
            ValueError: as `encode_values`.
        """
        z, log_dets = self.encode_values(h, y)
        return standard_normal_nats(z) - log_dets

    @property
    def divides_surprise(self) -> bool:
        """Whether this flow, as it is built, has `nats_of_values`."""
        return True

    def encode_values(self, h: Tensor, y: Condition) -> tuple[Tensor, Tensor]:
        """As `encode`, latents and log-determinants in the shape of ``h``; for models that mix no values.

        Raises:
            ValueError: this model mixes them.
        """
        del h, y
        raise ValueError(f"{type(self).__name__} mixes values, so they have no latents of their own; use another model")

    @torch.no_grad()
    def sample(
        self,
        num: int,
        y: Condition | int = None,
        temperature: float = 1.0,
        guidance: Guidance | float | None = None,
        generator: torch.Generator | None = None,
        *,
        seed: int | None = None,
        batch_size: int | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Draw ``num`` samples ``(num, *event)``, images on [-1, 1] and beyond; `pictures` makes PIL's of them.

        Args:
            num: how many.
            y: labels ``(num,)``, one label for all, or None, which drops them.
            temperature: standard deviation of the latent.
            guidance: how predictions are guided, or its scale.
            generator: of the latents.
            seed: draw sample i from (seed, i) alone, as the verb ``generate`` does, however many there are.
            batch_size: samples decoded together; None for all.
            progress: show a bar.

        Raises:
            ValueError: labels or guidance that do not fit this flow, or both a seed and a generator.
        """
        if seed is not None and generator is not None:
            raise ValueError("latents come from a seed or from a generator (got both); leave one out")
        reference = next(self.parameters())
        labels = torch.full((num,), y, dtype=torch.int64, device=reference.device) if isinstance(y, int) else y
        self.check_labels(labels, num)
        guidance = Guidance(scale=guidance) if isinstance(guidance, int | float) else guidance
        if seed is None:
            z = torch.randn(num, self.num_dims, generator=generator, dtype=reference.dtype, device=reference.device)
        else:
            z = latents(seed, range(num), self.num_dims).to(reference)
        size = max(1, batch_size or num)
        parts: list[Tensor] = []
        with telemetry.progress_bar(num, "sample", enabled=progress) as bar:
            for low in range(0, num, size):
                part = z[low : low + size]
                of_part = None if labels is None else labels[low : low + size].to(reference.device)
                decode = None if self.decoder is None else self.decoder(partial(_advance, bar, len(part)))
                parts.append(self.inverse(temperature * part, of_part, guidance, decode))
                if decode is None:
                    bar.update(len(part))
        return torch.cat(parts) if parts else z.new_empty(0, *self.event_shape)

    def stored(self, x: Float[Tensor, "B C H W"]) -> UInt8[Tensor, "B C H W"]:
        """Images as stored pixels, quantised as the training noise asks.

        Raises:
            ValueError: when the flow does not know its pixel format.
        """
        if self.pixels is None or self.pixels.noise == "none":
            what = "does not know its pixel format; train or load it through the pipeline"
            raise ValueError(f"this flow {'is of vectors and has no pixels' if self.pixels else what}")
        return quantize(x, self.pixels.bit_depth, rounding_of(self.pixels))

    def pictures(self, x: Float[Tensor, "B C H W"]) -> "list[Image]":
        """Images as PIL's.

        Raises:
            ValueError: when the flow does not know its pixel format, or there are not 1 or 3 channels.
        """
        from PIL import Image

        levels = self.stored(x).permute(0, 2, 3, 1).cpu().numpy()
        if levels.shape[3] not in (1, 3):
            raise ValueError(f"pictures have 1 or 3 channels (got {levels.shape[3]}); use the tensor")
        return [Image.fromarray(one.squeeze(2) if one.shape[2] == 1 else one) for one in levels]

    def denoised(self, x: Tensor, y: Condition, noise_std: float, strength: float = 1.0) -> Tensor:
        """One step of Tweedie's formula, ``x + strength noise_std^2 grad log p(x)``.

        A flow trained on images plus N(0, noise_std^2) samples noisy images; at strength 1 this is the mean of the
        clean image given the noisy one (arXiv 2412.06329, section 3.3).
        """
        how, self._activations = self._activations, "keep"  # rebuilding would add to the gradients of parameters
        try:
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                z, log_det = self(x, y)
                (score,) = torch.autograd.grad((standard_normal_log_prob(z) + log_det).sum(), x)
        finally:
            self._activations = how
        return x.detach() + strength * noise_std**2 * score

    def check_shape(self, x: Tensor) -> None:
        """Raise ValueError when images have another shape than this flow's."""
        if tuple(x.shape[1:]) != self.event_shape:
            raise ValueError(
                f"images must have shape (batch, {', '.join(map(str, self.event_shape))}) (got {tuple(x.shape)}); "
                f"use data of the shape this flow was built for"
            )

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
        if not self.takes_guidance:
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


def _advance(bar: Any, num: int, share: float) -> None:
    bar.update(num * share)
