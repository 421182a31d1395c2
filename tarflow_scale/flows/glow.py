"""Glow: normalise, mix, couple; squeeze and split; every prior learned.

Kingma and Dhariwal, "Glow: Generative Flow with Invertible 1x1 Convolutions", arXiv 1807.03039. An image passes L
levels. Each squeezes space into channels, applies K steps of ActNorm, invertible 1x1 convolution and coupling
(their table 1), and (except the last) splits off half of its channels as latents (their figure 2b).

The latents that are split off have a Gaussian prior whose mean and log-deviation a convolution predicts from the half
that goes on; the last level's have a learned Gaussian. Where there are classes, the label shifts both. All of
them are standardised:

    z = (h - mean) exp(-log_std),        log|det| -= sum log_std

so ``z`` is standard normal as a whole and one temperature acts on every level, as in the public code.

Differences from the public code (openai/glow): the statistics of ActNorm are those of all ranks together,
not rank 0's; ActNorm learns its log-scale directly, not a third of it; convolutions pad with zeros, without the
extra channel that marks the border; the label enters the priors of all levels, not the top one alone, through a
table that starts at zero, and without a classifier in the loss; the scale of an affine coupling is bounded from
below (without the bound a few samples in a hundred overflow); activations may be rebuilt from outputs.

Shapes: B batch, D dimensions, L levels, K steps a level. log_det: nats, summed over dimensions.
"""

from typing import Literal

from tarflow_scale.config.model import GlowConfig
from tarflow_scale.flows.coupling import ActNorm, Coupling, InvertibleConv, Layer
from tarflow_scale.flows.multiscale import Level, MultiScaleFlow, Step

__all__ = ["Glow", "GlowStep"]


class GlowStep(Step):
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


class Glow(MultiScaleFlow):
    """A multi-scale flow of `GlowStep`.

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

    capabilities = GlowConfig.CAPABILITIES

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
        for number in range(levels):
            channels, height, image_width = 4 * channels, height // 2, image_width // 2
            steps = [GlowStep(channels, width, coupling, log_scale_bound, convolution) for _ in range(steps_per_level)]
            level = Level(steps, channels, number < levels - 1, num_classes)
            self.add_level(level, channels, height, image_width)
            channels = level.passed_on
