"""Glow: a multi-scale image flow of ActNorm, invertible 1x1 convolutions and couplings, with learned priors.

Kingma and Dhariwal, "Glow: Generative Flow with Invertible 1x1 Convolutions", arXiv 1807.03039. An image passes L
levels. Each level squeezes space into channels, applies K steps of ActNorm, invertible 1x1 convolution and coupling
(their table 1), and (except the last) splits off half of its channels as latents (their figure 2b).

The latents that a level splits off have a Gaussian prior; a convolution predicts its mean and log-deviation from the
half that goes on to the next level. In the prior of the last level these are learned constants. In a flow with classes
the label shifts means and log-deviations. All latents are standardised:

    z = (h - mean) exp(-log_std),        log|det| -= sum log_std

so ``z`` is standard normal as a whole and one temperature acts on every level, as in the public code.

Differences from the public code (openai/glow): ActNorm is initialised from the images of all ranks, not of rank 0; it
learns its log-scale directly, not a third of it. Convolutions pad with zeros, without the extra channel that marks the
border. The label enters the priors of all levels, not only of the last, through a table that starts at zero, and there
is no classifier in the loss. The scale of an affine coupling is bounded from below; without the bound a few percent of
the samples overflow. The backward pass may rebuild activations from outputs.

Shapes: B batch, D dimensions, L levels, K steps on each level. log_det: nats, summed over dimensions.
"""

from tarflow_scale.config.model import GlowConfig
from tarflow_scale.flows.coupling import ActNorm, Coupling, InvertibleConv, Layer
from tarflow_scale.flows.multiscale import Level, MultiScaleFlow, Step

__all__ = ["Glow", "GlowStep"]


class GlowStep(Step):
    """ActNorm, a 1x1 convolution and a coupling.

    Args:
        channels: number of channels C.
        config: the section ``model``.
    """

    def __init__(self, channels: int, config: GlowConfig) -> None:
        super().__init__()
        self.norm = ActNorm(channels)
        self.mix = InvertibleConv(channels, config.convolution)
        self.couple = Coupling(channels, config.width, config.coupling, config.log_scale_bound)

    def layers(self) -> tuple[Layer, ...]:
        """The layers, in the direction from data to noise."""
        return (self.norm, self.mix, self.couple)


class Glow(MultiScaleFlow):
    """A multi-scale flow whose steps are `GlowStep`.

    Args:
        event_shape: ``(C, H, W)``; H and W must be multiples of ``2^levels``.
        num_classes: number of classes; None for an unconditional model.
        config: the section ``model``.

    Raises:
        ValueError: the image cannot be squeezed on every level.
    """

    capabilities = GlowConfig.CAPABILITIES

    def __init__(self, event_shape: tuple[int, int, int], num_classes: int | None, config: GlowConfig) -> None:
        super().__init__(event_shape, num_classes, config.logit_alpha)
        (channels, height, width), levels = event_shape, config.levels
        if height % 2**levels or width % 2**levels:
            raise ValueError(
                f"image height and width must be multiples of 2^model.levels (got {height}x{width} and "
                f"2^{levels} = {2**levels}); choose fewer levels"
            )
        for number in range(levels):
            channels, height, width = 4 * channels, height // 2, width // 2
            steps = [GlowStep(channels, config) for _ in range(config.steps_per_level)]
            level = Level(steps, channels, number < levels - 1, num_classes)
            self.add_level(level, channels, height, width)
            channels = level.passed_on
