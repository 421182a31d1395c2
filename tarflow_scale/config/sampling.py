"""The section ``sampling``: how a flow is sampled."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from tarflow_scale.config.base import Section

__all__ = ["DecoderConfig", "GuardConfig", "Guidance", "Labels", "NamedLabels", "SamplingConfig"]

Labels = Literal["balanced"] | tuple[int, ...] | dict[int, float]
"""Labels of generated images. ``balanced``: image i has label i modulo the number of classes. A list: these labels in
turn. A mapping: random labels with these weights."""
NamedLabels = Literal["balanced"] | tuple[int | str, ...] | dict[int | str, float]
"""`Labels`, where a class may also be given by its name."""


class Guidance(Section):
    """Guidance of sampling: the parameters of each token move away from those that ignore the label.

    See arXiv 2412.06329, section 3.4, and for ``rule=gaussian`` arXiv 2506.06276.
    """

    OMITTED_AT_DEFAULT: ClassVar[frozenset[str]] = frozenset({"rule"})

    scale: float = Field(default=0.0, ge=0)
    """Strength of the guidance; 0 samples the distribution of the model."""
    annealed: bool = False
    """TarFlow: increase the strength linearly over the T tokens of a block, from scale / (T - 1) to scale."""
    attention_temperature: float = Field(default=1.0, gt=0)
    """TarFlow: divisor of the attention logits in the prediction of a_weak. A model without classes needs a value other
    than 1, because at 1 its two predictions are equal."""
    what: Literal["both", "log_scale", "mean"] = "both"
    """The predicted parameters to which guidance applies."""
    rule: Literal["linear", "gaussian"] = "linear"
    """``linear``: each log-scale and mean a becomes a + scale (a - a_weak), where a_weak ignores the label.
    ``gaussian``, for TarFlow: the density p of a token becomes proportional to p^(1 + scale) / p_weak^scale, a Gaussian
    again, where the ratio of the deviations of p and p_weak is limited to 1."""
    blocks: Literal["all", "first"] = "all"
    """TarFlow: the blocks with guidance. ``first``: only the block that is decoded first, as in STARFlow (arXiv
    2506.06276); this halves the cost of the other blocks."""

    @model_validator(mode="after")
    def _has_an_effect(self) -> "Guidance":
        if self.scale == 0 and self != Guidance.model_construct():
            raise ValueError(
                "the other keys of guidance have no effect at scale=0 (got scale=0); set scale, or remove these keys"
            )
        if self.rule == "gaussian" and self.what != "both":
            raise ValueError(f"rule=gaussian changes log-scales and means together (got what={self.what}); remove what")
        return self


class DecoderConfig(Section):
    """How the latents of a TarFlow are decoded; other flows have only one decoder."""

    kind: Literal["exact", "adaptive"] = "exact"
    """``exact``: decode token by token. ``adaptive``: decode several tokens together by fixed-point iteration, in the
    blocks where ``generate --calibrate`` measured that this is faster."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the transformers and their cache; scales and means are always fp32."""
    tolerance: float = Field(default=1e-3, gt=0)
    """``adaptive``: the iteration of a token ends when no feature changes by more than this, on the scale [-1, 1]."""


class SamplingConfig(Section):
    """How the flow is sampled. Image i depends on (weights, seed, i) and these settings, not on the batch."""

    batch_size: int | None = Field(default=128, ge=1)
    """Number of images that are decoded together; None uses as many as fit in the free memory of the device, at most
    1,024."""
    decoder: DecoderConfig = DecoderConfig()
    guidance: Guidance = Guidance()
    temperature: float = Field(default=1.0, ge=0)
    """Standard deviation of the latents."""
    denoise: float = Field(default=0.0, ge=0)
    """Strength of one Tweedie denoising step, for models trained with Gaussian noise: 1 removes the expected noise, 0
    makes no step."""


class GuardConfig(Section):
    """Rules for rejecting images. A rejected image is drawn again from a new latent, determined by the image index."""

    saturated_share: float | None = Field(default=None, gt=0, le=1)
    """Maximum share of saturated values in an image: values outside [-1, 1] by more than one level. An image with more
    is rejected. None turns this test off. Images with values that are not finite are always rejected."""
    attempts: int = Field(default=3, ge=0)
    """Maximum number of times that an image is drawn again; if it is still rejected, the generation fails."""
    most_redrawn_share: float = Field(default=0.01, ge=0, le=1)
    """Maximum share of images that may be drawn again. With more, the generation fails, because the model is probably
    bad. Three redrawn images are always allowed, unless the share is 0."""
