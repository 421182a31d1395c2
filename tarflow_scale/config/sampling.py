"""How a flow is sampled."""

from typing import Literal

from pydantic import Field, model_validator

from tarflow_scale.config.base import Section

__all__ = ["DecoderConfig", "GuardConfig", "Guidance", "Labels", "NamedLabels", "SamplingConfig"]

Labels = Literal["balanced"] | tuple[int, ...] | dict[int, float]
"""``balanced``: image i has label i modulo the number of classes. A list: its labels in turn. A mapping: each label is
drawn with its weight."""


NamedLabels = Literal["balanced"] | tuple[int | str, ...] | dict[int | str, float]
"""The same, where classes may be named."""


class Guidance(Section):
    """Guidance of sampling: predictions a become a + scale (a - a_weak), where the weak prediction drops the label.

    It acts on log-scale and mean alike (arXiv 2412.06329, section 3.4).
    """

    scale: float = Field(default=0.0, ge=0)
    """Strength; 0 samples the model's own distribution."""
    annealed: bool = False
    """TarFlow: the strength rises linearly over the T tokens of a block, from scale / (T - 1) to scale."""
    attention_temperature: float = Field(default=1.0, gt=0)
    """TarFlow: attention logits of the weak prediction are divided by it. It is what guides a model without classes,
    whose two predictions are equal at 1."""
    what: Literal["both", "log_scale", "mean"] = "both"
    """Which of the two parameters is guided."""
    blocks: Literal["all", "first"] = "all"
    """TarFlow: where it acts. ``first``: in the block that is decoded first alone, as in STARFlow (arXiv 2506.06276),
    which halves the work of the others."""

    @model_validator(mode="after")
    def _has_an_effect(self) -> "Guidance":
        if self.scale == 0 and self != Guidance.model_construct():
            raise ValueError("the other keys of guidance have no effect at scale=0; set a scale")
        return self


class DecoderConfig(Section):
    """How the latents of a TarFlow become images; the other flows have one way."""

    kind: Literal["exact", "adaptive"] = "exact"
    """``exact``: token by token. ``adaptive``: several tokens at once where a plan, which ``generate --calibrate``
    measures, says that it is faster."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the transformers and their cache; scale and mean are fp32 in any case."""
    tolerance: float = Field(default=1e-3, gt=0)
    """``adaptive``: tokens are iterated until no feature moves by more, on the scale of [-1, 1]."""


class SamplingConfig(Section):
    """How the flow is sampled. Image i depends on (weights, seed, i) and these settings, not on the batch."""

    batch_size: int | None = Field(default=128, ge=1)
    """Images decoded together; None takes as many as fit in the device's free memory, at most 1,024."""
    decoder: DecoderConfig = DecoderConfig()
    guidance: Guidance = Guidance()
    temperature: float = Field(default=1.0, ge=0)
    """Standard deviation of the latent."""
    denoise: float = Field(default=0.0, ge=0)
    """Strength of one Tweedie step, for models trained with Gaussian noise: 1 removes the noise in the mean, 0 is
    off."""


class GuardConfig(Section):
    """Which images are not kept. Image i is drawn again with its next latent until it is good."""

    saturated_share: float | None = Field(default=None, gt=0, le=1)
    """An image is bad if a larger share of its values lies outside [-1, 1] by more than a level; None accepts any.
    Values that are not finite are always bad."""
    attempts: int = Field(default=3, ge=0)
    """Times that an image may be drawn again; one that is bad after that ends the generation."""
    most_redrawn_share: float = Field(default=0.01, ge=0, le=1)
    """A larger share of images that were drawn again ends the generation: the model is at fault, not chance. Three
    are let pass, however few are made; none at 0."""
