"""Glow: normalise, mix, couple; squeeze and split; every prior learned.

Kingma and Dhariwal, "Glow: Generative Flow with Invertible 1x1 Convolutions", arXiv 1807.03039. An image passes L
levels. Each squeezes space into channels, applies K steps of ActNorm, invertible 1x1 convolution and coupling
(their table 1), and, but for the last, splits off half of its channels as latents (their figure 2b).

The latents that are split off have a Gaussian prior whose mean and log-deviation a convolution reads from the half
that goes on; the last level's have a learned Gaussian, and where there are classes the label shifts both. All of
them are standardised:

    z = (h - mean) exp(-log_std),        log|det| -= sum log_std

so ``z`` is standard normal as a whole and one temperature acts on every level, as in the public code.

What differs from the public code (openai/glow), and why: the statistics of ActNorm are those of all ranks together,
not rank 0's; ActNorm learns its log-scale directly, not a third of it; convolutions pad with zeros, without the
extra channel that marks the border; the label enters the priors of all levels, not the top one alone, through a
table that starts at zero, and without a classifier in the loss; the scale of an affine coupling is bounded from
below, without which a few samples in a hundred overflow; activations may be rebuilt from outputs.

Shapes: B batch, D dimensions, L levels, K steps a level. log_det: nats, summed over dimensions.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tarflow_scale.config import Guidance
from tarflow_scale.flows.coupling import (
    ActNorm,
    Coupling,
    InvertibleConv,
    Layer,
    ZeroConv,
    squeeze,
    unsqueeze,
)
from tarflow_scale.flows.flow import Activations, Condition, Flow, embed_labels
from tarflow_scale.flows.memory import ANCHOR_EVERY, run_layers

__all__ = ["Glow", "GlowLevel", "GlowStep", "Prior"]


class GlowStep(nn.Module):
    """ActNorm, 1x1 convolution, coupling.

    Args:
        channels: C.
        width: of the coupling's network.
        coupling: affine or additive.
        bound: of the scale of an affine coupling; see `Coupling`.
        convolution: parametrisation of the 1x1 convolution.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        coupling: Literal["affine", "additive"],
        bound: float | None,
        convolution: Literal["dense", "lu"],
    ) -> None:
        super().__init__()
        self.norm = ActNorm(channels)
        self.mix = InvertibleConv(channels, convolution)
        self.couple = Coupling(channels, width, coupling, bound)

    def layers(self) -> tuple[Layer, ...]:
        """The layers, in the direction from data to noise."""
        return (self.norm, self.mix, self.couple)


class Prior(nn.Module):
    """Mean and log-deviation of latents, given the features that go on and the label.

    Args:
        context_channels: channels of those features; 0 for the last level, which has none and learns constants.
        channels: of the latents.
        num_classes: classes, or None.
    """

    def __init__(self, context_channels: int, channels: int, num_classes: int | None) -> None:
        super().__init__()
        self.network = ZeroConv(context_channels, 2 * channels) if context_channels else None
        self.constant = None if context_channels else nn.Parameter(torch.zeros(2 * channels))
        self.class_embedding = None if num_classes is None else nn.Parameter(torch.zeros(num_classes, 2 * channels))

    def forward(self, context: Tensor | None, y: Condition) -> tuple[Tensor, Tensor]:
        """Mean and log-deviation, ``(B or 1, C, H or 1, W or 1)``, in fp32 or wider."""
        if self.network is not None:
            assert context is not None
            out = self.network(context).to(context.dtype)
        else:
            assert self.constant is not None
            out = self.constant[None, :, None, None]
        if self.class_embedding is not None:
            out = out + embed_labels(self.class_embedding, y)[:, :, None, None]
        mean, log_std = out.chunk(2, dim=1)
        return mean, log_std


class GlowLevel(nn.Module):
    """K steps, and the prior of what this level gives out as latents.

    Args:
        channels: C after the squeeze.
        num_steps: K.
        split: whether half of the channels go on to another level.
        width, coupling, bound, convolution: of the steps.
        num_classes: classes, or None.
    """

    def __init__(
        self,
        channels: int,
        num_steps: int,
        split: bool,
        width: int,
        coupling: Literal["affine", "additive"],
        bound: float | None,
        convolution: Literal["dense", "lu"],
        num_classes: int | None,
    ) -> None:
        super().__init__()
        self.steps = nn.ModuleList(GlowStep(channels, width, coupling, bound, convolution) for _ in range(num_steps))
        self.passed_on = channels // 2 if split else 0
        self.prior = Prior(self.passed_on, channels - self.passed_on, num_classes)

    def groups(self) -> Sequence[tuple[Layer, ...]]:
        """The layers of each step."""
        return [step.layers() for step in self.steps]  # pyright: ignore[reportCallIssue]

    def take_latents(self, h: Tensor, y: Condition) -> tuple[Tensor | None, Tensor, Tensor]:
        """Split ``h`` into what goes on (None at the last level) and standardised latents; and the log-determinant."""
        context, latents = (h[:, : self.passed_on], h[:, self.passed_on :]) if self.passed_on else (None, h)
        mean, log_std = self.prior(context, y)
        with torch.autocast(h.device.type, enabled=False):
            z = (latents - mean) * torch.exp(-log_std)
            log_det = -log_std.expand_as(latents).sum(dim=(1, 2, 3))
        return context, z, log_det

    def give_latents(self, z: Tensor, context: Tensor | None, y: Condition, guidance: Guidance | None) -> Tensor:
        """Inverse of `take_latents`; ``guidance`` is None or has an effect."""
        mean, log_std = self.prior(context, y)
        if guidance is not None:
            weak_mean, weak_log_std = self.prior(context, None)
            if guidance.what in ("both", "mean"):
                mean = mean + guidance.scale * (mean - weak_mean)
            if guidance.what in ("both", "log_scale"):
                log_std = log_std + guidance.scale * (log_std - weak_log_std)
        latents = z * torch.exp(log_std) + mean
        return latents if context is None else torch.cat([context, latents], dim=1)


class Glow(Flow):
    """A multi-scale flow of `GlowLevel`.

    Args:
        event_shape: ``(C, H, W)``; H and W must be multiples of ``2^levels``.
        num_classes: classes, or None for an unconditional model.
        levels: L.
        steps_per_level: K.
        width: channels inside couplings; 512 as published.
        coupling: affine or additive.
        convolution: parametrisation of the 1x1 convolutions.
        log_scale_bound: bound c of affine couplings, see `Coupling`; None for the published form.
        logit_alpha: see `Flow`.

    Raises:
        ValueError: when the image cannot be squeezed so often.
    """

    activation_choices: ClassVar[tuple[Activations, ...]] = ("keep", "checkpoint", "rebuild")

    def __init__(
        self,
        event_shape: tuple[int, int, int],
        num_classes: int | None,
        *,
        levels: int,
        steps_per_level: int,
        width: int = 512,
        coupling: Literal["affine", "additive"] = "affine",
        convolution: Literal["dense", "lu"] = "lu",
        log_scale_bound: float | None = 3.0,
        logit_alpha: float | None = None,
    ) -> None:
        super().__init__(event_shape, num_classes, logit_alpha)
        channels, height, image_width = event_shape
        if height % 2**levels or image_width % 2**levels:
            raise ValueError(
                f"image height and width must be multiples of 2^model.levels (got {height}x{image_width} and "
                f"2^{levels} = {2**levels}); choose fewer levels"
            )
        self.anchor_every = ANCHOR_EVERY
        """Steps between anchors when activations are rebuilt."""
        self.levels = nn.ModuleList()
        self.latent_shapes: list[tuple[int, int, int]] = []
        """Shape of the latents that each level gives out; ``z`` is these, flattened and laid end to end."""
        for number in range(levels):
            channels, height, image_width = 4 * channels, height // 2, image_width // 2
            level = GlowLevel(
                channels,
                steps_per_level,
                number < levels - 1,
                width,
                coupling,
                log_scale_bound,
                convolution,
                num_classes,
            )
            self.levels.append(level)
            self.latent_shapes.append((channels - level.passed_on, height, image_width))
            channels = level.passed_on

    @torch.no_grad()
    def initialize(self, x: Float[Tensor, "B c H W"], y: Condition = None) -> None:
        """Set every ActNorm from ``x``, this rank's part of one batch; all ranks must call."""
        norms = [module for module in self.modules() if isinstance(module, ActNorm)]
        hooks = [norm.register_forward_pre_hook(_initialize_norm) for norm in norms]
        try:
            self(x, y)
        finally:
            for hook in hooks:
                hook.remove()

    def encode(self, h: Float[Tensor, "B c H W"], y: Condition) -> tuple[Float[Tensor, "B D"], Float[Tensor, " B"]]:
        """Data to noise: ``z (B, D)``, level after level, and ``log_det (B,)`` in nats."""
        log_det, latents = h.new_zeros(len(h)), list[Tensor]()
        passed_on: Tensor | None = h
        for level in self._levels():
            assert passed_on is not None
            squeezed = squeeze(passed_on)
            mapped, steps_log_det = run_layers(level.groups(), squeezed, self.activations, self.anchor_every)
            passed_on, z, prior_log_det = level.take_latents(mapped, y)
            latents.append(z.flatten(1))
            log_det = log_det + steps_log_det + prior_log_det
        return torch.cat(latents, dim=1), log_det

    def decode(self, z: Float[Tensor, "B D"], y: Condition, guidance: Guidance | None) -> Float[Tensor, "B c H W"]:
        """Noise to data.

        Guidance moves the means and log-deviations of the priors, where the label enters; it has no effect on a
        model without classes.
        """
        parts = z.split([c * h * w for c, h, w in self.latent_shapes], dim=1)
        h: Tensor | None = None
        for level, part, shape in zip(
            reversed(self._levels()), reversed(parts), reversed(self.latent_shapes), strict=True
        ):
            h = level.give_latents(part.unflatten(1, shape), h, y, guidance)
            for group in reversed(level.groups()):
                for layer in reversed(group):
                    h = layer.inverse(h)
            h = unsqueeze(h)
        assert h is not None
        return h

    def is_guided(self, y: Condition, guidance: Guidance | None) -> bool:
        """As `Flow.is_guided`; it takes classes, and there are no tokens to anneal over and no attention.

        Raises:
            ValueError: guidance without classes or labels, or settings that are TarFlow's.
        """
        if guidance is None or guidance.scale == 0:
            return False
        if self.num_classes is None or y is None:
            raise ValueError(f"guidance of Glow needs classes and labels (got scale={guidance.scale}); set it to 0")
        if guidance.annealed or guidance.attention_temperature != 1:
            raise ValueError(
                f"annealed and attention_temperature have no effect on Glow (got {guidance.annealed} and "
                f"{guidance.attention_temperature}); leave them out"
            )
        return True

    def _levels(self) -> list[GlowLevel]:
        return list(self.levels)  # pyright: ignore[reportReturnType]


def _initialize_norm(norm: nn.Module, arguments: tuple[Tensor, ...]) -> None:
    assert isinstance(norm, ActNorm)
    norm.initialize(arguments[0])
