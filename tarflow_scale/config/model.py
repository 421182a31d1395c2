"""The section ``model``: one class for each kind of flow, and what flows of that kind can do.

Defaults live here and nowhere else. Code outside of a flow's own module asks for `Capabilities`, not for the kind.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from tarflow_scale.config.base import Section

__all__ = [
    "Activations",
    "Capabilities",
    "ContinuousConfig",
    "DequantizationConfig",
    "GlowConfig",
    "IAFConfig",
    "MAFConfig",
    "ModelConfig",
    "NICEConfig",
    "RealNVPConfig",
    "TarFlowConfig",
]


Activations = Literal["keep", "checkpoint", "rebuild"]
"""What the backward pass does for activations: keep them, compute them again from the kept inputs of layers, or rebuild
them from outputs by inverting layers."""


@dataclass(frozen=True)
class Capabilities:
    """What a kind of flow can do.

    Args:
        vectors: whether events may be vectors ``(D,)``, beside images ``(C, H, W)``.
        activations: what its backward pass can do for activations.
        guidance: whether its samples can be guided.
        separate_networks: whether its maps are made by networks that can be compiled by themselves, and whose matrices
            Muon can update.
        divided_weights: whether its weights may be divided among ranks (ZeRO stage 3).
        batch_statistics: whether a training pass normalizes by statistics of its batch, so that the division of a batch
            into micro batches changes results.
    """

    vectors: bool = True
    activations: tuple[Activations, ...] = ("keep", "checkpoint")
    guidance: bool = True
    separate_networks: bool = True
    divided_weights: bool = True
    batch_statistics: bool = False


class DequantizationConfig(Section):
    """Variational dequantization (Flow++, arXiv 1902.00275); see `tarflow_scale.flows.dequantization`."""

    couplings: int = Field(default=4, ge=1)
    """Affine couplings; pixels of even and odd squares take turns, so two reach all of them."""
    width: int = Field(default=32, ge=1)
    """Channels of the network inside each coupling."""


class _FlowConfig(Section):
    CAPABILITIES: ClassVar[Capabilities] = Capabilities()

    class_conditional: bool = True
    """Whether labels condition the flow, or the numbers that vectors are given with."""
    logit_alpha: float | None = Field(default=None, gt=0, lt=0.5)
    """Pixels pass logit(alpha + (1 - 2 alpha) p) before the flow, p on [0, 1], which spreads out black and white;
    for images that are mostly either, under uniform noise. None leaves them on [-1, 1]."""
    dequantization: DequantizationConfig | None = None
    """Uniform noise of images passes a small flow, learned with this one, that knows the image: a tighter bound on
    the cost of its pixels. None leaves the noise uniform."""

    @property
    def capabilities(self) -> Capabilities:
        """What this flow can do, as it is configured."""
        return self.CAPABILITIES

    @model_serializer(mode="wrap")
    def _written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without ``dequantization`` where there is none, so that runs and digests from before it was there stay."""
        written: dict[str, Any] = handler(self)
        if self.dequantization is None:
            written.pop("dequantization", None)
        return written


class TarFlowConfig(_FlowConfig):
    """TarFlow (arXiv 2412.06329); see `tarflow_scale.flows.tarflow`."""

    CAPABILITIES: ClassVar[Capabilities] = Capabilities(vectors=False)
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

    CAPABILITIES: ClassVar[Capabilities] = Capabilities(vectors=False, activations=("keep", "checkpoint", "rebuild"))
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


class NICEConfig(_FlowConfig):
    """NICE (arXiv 1410.8516); see `tarflow_scale.flows.nice`."""

    CAPABILITIES: ClassVar[Capabilities] = Capabilities(guidance=False)
    kind: Literal["nice"] = "nice"
    """Chooses this model; must be written."""
    couplings: int = Field(default=4, ge=2)
    """Additive couplings; even and odd dimensions take turns."""
    width: int = Field(default=1000, ge=1)
    """Units of a hidden layer."""
    hidden_layers: int = Field(default=5, ge=1)
    """Hidden layers of each coupling's network."""


class RealNVPConfig(_FlowConfig):
    """RealNVP (arXiv 1605.08803); see `tarflow_scale.flows.realnvp`."""

    CAPABILITIES: ClassVar[Capabilities] = Capabilities()
    BATCH_CAPABILITIES: ClassVar[Capabilities] = Capabilities(activations=("keep",), batch_statistics=True)
    kind: Literal["realnvp"] = "realnvp"
    """Chooses this model; must be written."""
    levels: int = Field(ge=1)
    """Levels; the image size must be a multiple of 2^(levels - 1). Of vectors: four couplings each."""
    width: int = Field(default=64, ge=1)
    """Channels of the residual networks on the first level; each squeeze doubles them. Of vectors: units."""
    residual_blocks: int = Field(default=4, ge=1)
    """Residual blocks of each coupling's network."""
    normalization: Literal["actnorm", "batch"] = "actnorm"
    """Between couplings. ``actnorm``: a scale and a shift that are set from the first batch and learned from then on.
    ``batch``: the published one, statistics of batches in training and running ones afterwards."""
    log_scale_bound: float = Field(default=2.0, gt=0)
    """Bound c of the log-scales, c tanh(raw / c)."""

    @property
    def capabilities(self) -> Capabilities:
        """What this flow can do, as it is configured."""
        return self.BATCH_CAPABILITIES if self.normalization == "batch" else self.CAPABILITIES


class _AutoregressiveConfig(_FlowConfig):
    CAPABILITIES: ClassVar[Capabilities] = Capabilities(guidance=False, separate_networks=False)

    transforms: int = Field(default=5, ge=1)
    """Autoregressive transformations; the order of dimensions is reversed from one to the next."""
    hidden_widths: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(512, 512), min_length=1)
    """Units of the hidden layers of each masked network."""
    label_width: int = Field(default=16, ge=1)
    """Numbers that a label becomes at the input of every network."""


class MAFConfig(_AutoregressiveConfig):
    """Masked autoregressive flow (arXiv 1705.07057): scores in one pass; see `tarflow_scale.flows.autoregressive`."""

    kind: Literal["maf"] = "maf"
    """Chooses this model; must be written."""


class IAFConfig(_AutoregressiveConfig):
    """Inverse autoregressive flow (arXiv 1606.04934): samples in one pass; see `tarflow_scale.flows.autoregressive`."""

    kind: Literal["iaf"] = "iaf"
    """Chooses this model; must be written."""


class ContinuousConfig(_FlowConfig):
    """Continuous flow, FFJORD (arXiv 1810.01367); see `tarflow_scale.flows.continuous`."""

    CAPABILITIES: ClassVar[Capabilities] = Capabilities(
        activations=("keep",), guidance=False, separate_networks=False, divided_weights=False
    )
    kind: Literal["continuous"] = "continuous"
    """Chooses this model; must be written."""
    width: int = Field(default=64, ge=1)
    """Channels (of vectors: units) of the hidden layers of the dynamics."""
    hidden_layers: int = Field(default=3, ge=1)
    """Hidden layers of the dynamics."""
    solver: Literal["dopri5", "bosh3", "rk4", "midpoint"] = "dopri5"
    """Adaptive (``dopri5``, ``bosh3``), or of fixed steps (``rk4``, ``midpoint``), for training alone: likelihoods and
    samples afterwards are those of an adaptive one."""
    tolerance: float = Field(default=1e-5, gt=0)
    """Relative and absolute error that an adaptive solver aims at; it also decides how exact the inverse is."""
    num_steps: int = Field(default=20, ge=1)
    """Steps of a solver of fixed ones."""
    gradients: Literal["adjoint", "direct"] = "adjoint"
    """``adjoint``: solved backwards, in memory that does not grow with steps. ``direct``: through the solver's own
    operations, exact for what it computed."""
    exact_trace_dims: int = Field(default=64, ge=0)
    """In evaluation the trace is exact up to so many dimensions, and estimated by a probe above; in training it is
    always estimated."""
    max_evaluations: int = Field(default=2000, ge=1)
    """A solve that needs more evaluations of the dynamics ends in an error."""

    @model_validator(mode="after")
    def _steps_fit(self) -> "ContinuousConfig":
        evaluations = {"rk4": 4, "midpoint": 2}.get(self.solver, 0) * self.num_steps
        if evaluations > self.max_evaluations:
            raise ValueError(
                f"max_evaluations must allow those of num_steps (got {self.max_evaluations}, and {self.num_steps} "
                f"steps of {self.solver} take {evaluations}); raise it"
            )
        return self


ModelConfig = Annotated[
    TarFlowConfig | GlowConfig | NICEConfig | RealNVPConfig | MAFConfig | IAFConfig | ContinuousConfig,
    Field(discriminator="kind"),
]
"""The flow to train."""
