"""The section ``model``: one class a flow, told apart by ``kind``. Defaults live here and nowhere else."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tarflow_scale.config.base import Section

__all__ = ["GlowConfig", "ModelConfig", "TarFlowConfig"]


class _FlowConfig(Section):
    class_conditional: bool = True
    """Whether labels condition the flow."""
    logit_alpha: float | None = Field(default=None, gt=0, lt=0.5)
    """Pixels pass logit(alpha + (1 - 2 alpha) p) before the flow, p on [0, 1], which spreads out black and white;
    for images that are mostly either, under uniform noise. None leaves them on [-1, 1]."""


class TarFlowConfig(_FlowConfig):
    """TarFlow (arXiv 2412.06329); see `tarflow_scale.flows.tarflow`."""

    kind: Literal["tarflow"] = "tarflow"
    """Chooses this model; must be written."""
    patch_size: int = Field(ge=1)
    """Side of a patch in pixels; must divide the image size."""
    width: int = Field(ge=1)
    """Channels of the transformer; a multiple of ``head_width``."""
    layers_per_block: tuple[Annotated[int, Field(ge=1)], ...] = Field(min_length=1)
    """Transformer layers of each block, from data to noise; its length is the number of blocks."""
    head_width: int = Field(default=64, ge=1)
    """Width of one attention head."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout of features of the residual branches, alike for all tokens of a sample; for small data sets."""
    variant: Literal["affine", "volume_preserving"] = "affine"
    """``affine``: every token is shifted and scaled. ``volume_preserving``: shifted only, and the latent has one
    learned deviation per feature."""
    log_scale_bound: float | None = Field(default=None, gt=0)
    """Smooth bound c of a block's log-scales, c tanh(a / c), against overflow at high resolution; None for none."""

    @model_validator(mode="after")
    def _fits(self) -> "TarFlowConfig":
        if self.width % self.head_width:
            raise ValueError(
                f"width must be a multiple of head_width (got {self.width} and {self.head_width}); change either"
            )
        if self.log_scale_bound is not None and self.variant == "volume_preserving":
            raise ValueError(
                f"log_scale_bound has no effect on variant=volume_preserving (got {self.log_scale_bound}); remove it"
            )
        return self


class GlowConfig(_FlowConfig):
    """Glow (arXiv 1807.03039); see `tarflow_scale.flows.glow`."""

    kind: Literal["glow"] = "glow"
    """Chooses this model; must be written."""
    levels: int = Field(ge=1)
    """Levels L; the image size must be a multiple of 2^levels."""
    steps_per_level: int = Field(ge=1)
    """Steps K of ActNorm, 1x1 convolution and coupling on each level."""
    width: int = Field(default=512, ge=1)
    """Channels of the networks inside couplings."""
    coupling: Literal["affine", "additive"] = "affine"
    """``affine`` reaches better likelihoods; ``additive`` is the published choice for large images and samples."""
    convolution: Literal["dense", "lu"] = "lu"
    """Parametrisation of the 1x1 convolutions; ``lu`` has a cheap determinant, ``dense`` fewer operations."""
    log_scale_bound: float | None = Field(default=3.0, gt=0)
    """Smooth bound c of affine couplings, whose scale is sigmoid(c tanh(raw / c) + 2): at 3 between 0.27 and 0.99.
    None is the published form, whose samples may overflow. Additive couplings have no scale."""


ModelConfig = Annotated[TarFlowConfig | GlowConfig, Field(discriminator="kind")]
"""The flow to train."""
