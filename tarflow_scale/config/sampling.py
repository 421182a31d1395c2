"""The section ``sampling``: how a flow is sampled."""

from typing import Literal

from pydantic import Field, model_validator

from tarflow_scale.config.base import Section

__all__ = ["DecoderConfig", "GuardConfig", "Guidance", "Labels", "NamedLabels", "SamplingConfig"]

Labels = Literal["balanced"] | tuple[int, ...] | dict[int, float]
"""``balanced``: image i has label i modulo the number of classes. A list: its labels in turn. A mapping: each label is
drawn with its weight."""
NamedLabels = Literal["balanced"] | tuple[int | str, ...] | dict[int | str, float]
"""`Labels`, with numbers or names of classes."""


class Guidance(Section):
    """Guidance of sampling: a prediction a becomes a + scale (a - a_weak); the weak prediction drops the label.

    It applies to the log-scale and the mean (arXiv 2412.06329, section 3.4).
    """

    scale: float = Field(default=0.0, ge=0)
    """Strength; 0 samples the model's own distribution."""
    annealed: bool = False
    """TarFlow: the strength rises linearly over the T tokens of a block, from scale / (T - 1) to scale."""
    attention_temperature: float = Field(default=1.0, gt=0)
    """TarFlow: attention logits of the weak prediction are divided by it. A model without classes needs a value other
    than 1, because its two predictions are equal at 1."""
    what: Literal["both", "log_scale", "mean"] = "both"
    """Parameters that are guided."""
    blocks: Literal["all", "first"] = "all"
    """TarFlow: blocks with guidance. ``first``: only the block that is decoded first, as in STARFlow (arXiv
    2506.06276), which halves the cost of the other blocks."""

    @model_validator(mode="after")
    def _has_an_effect(self) -> "Guidance":
        if self.scale == 0 and self != Guidance.model_construct():
            raise ValueError("the other keys of guidance have no effect at scale=0; set a scale")
        return self


class DecoderConfig(Section):
    """How the latents of a TarFlow are decoded; other flows have one decoder."""

    kind: Literal["exact", "adaptive"] = "exact"
    """``exact``: token by token. ``adaptive``: several tokens at once in blocks where that is faster, as measured by
    ``generate --calibrate``."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the transformers and their cache; scale and mean are always fp32."""
    tolerance: float = Field(default=1e-3, gt=0)
    """``adaptive``: iterations of a token end when no feature moves by more, on the scale of [-1, 1]."""


class SamplingConfig(Section):
    """How the flow is sampled. Image i depends on (weights, seed, i) and these settings, not on the batch."""

    batch_size: int | None = Field(default=128, ge=1)
    """Images decoded together; None uses as many as fit in the free memory of the device, at most 1,024."""
    decoder: DecoderConfig = DecoderConfig()
    guidance: Guidance = Guidance()
    temperature: float = Field(default=1.0, ge=0)
    """Standard deviation of the latent."""
    denoise: float = Field(default=0.0, ge=0)
    """Strength of one Tweedie step, for models trained with Gaussian noise: 1 removes the expected noise, 0 is off."""


class GuardConfig(Section):
    """Which images are rejected. A rejected image i is drawn again from its next latent."""

    saturated_share: float | None = Field(default=None, gt=0, le=1)
    """An image is rejected if a larger share of its values lies outside [-1, 1] by more than a level; None turns this
    test off. Images with values that are not finite are always rejected."""
    attempts: int = Field(default=3, ge=0)
    """Number of times that an image may be drawn again; if it is still rejected, the generation fails."""
    most_redrawn_share: float = Field(default=0.01, ge=0, le=1)
    """If a larger share of images was drawn again, the generation fails, because the model is at fault. Three redrawn
    images are always allowed, except at 0, which allows none."""
