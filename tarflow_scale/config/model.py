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
    """Affine couplings; they alternate between the two colours of a checkerboard, so two change every pixel."""
    width: int = Field(default=32, ge=1)
    """Channels of the network inside each coupling."""


class _FlowConfig(Section):
    CAPABILITIES: ClassVar[Capabilities] = Capabilities()

    class_conditional: bool = True
    """Whether the flow is conditioned on labels, or on the condition values of vectors."""
    logit_alpha: float | None = Field(default=None, gt=0, lt=0.5)
    """Pixels p on [0, 1] are transformed by logit(alpha + (1 - 2 alpha) p) before the flow, which spreads out values
    near black and white; for images that are mostly black or white, with uniform noise. None keeps [-1, 1]."""
    dequantization: DequantizationConfig | None = None
    """Variational dequantization: a small flow, conditioned on the image and trained with this one, transforms the
    uniform noise, which tightens the bound on bits/dim. None keeps uniform noise."""

    @property
    def capabilities(self) -> Capabilities:
        """What this flow can do, as it is configured."""
        return self.CAPABILITIES

    @model_serializer(mode="wrap")
    def _written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Omit ``dequantization`` if it is None, so that digests of configurations without it stay the same."""
        written: dict[str, Any] = handler(self)
        if self.dequantization is None:
            written.pop("dequantization", None)
        return written


class TarFlowConfig(_FlowConfig):
    """TarFlow (arXiv 2412.06329); see `tarflow_scale.flows.tarflow`."""

    CAPABILITIES: ClassVar[Capabilities] = Capabilities(vectors=False)
    kind: Literal["tarflow"] = "tarflow"
    """Selects this model; required."""
    patch_size: int = Field(ge=1)
    """Side of a patch in pixels; must divide the image size."""
    width: int = Field(ge=1)
    """Channels of the transformer; a multiple of ``head_width``."""
    layers_per_block: tuple[Annotated[int, Field(ge=1)], ...] = Field(min_length=1)
    """Number of transformer layers of each block, from data to noise; the list has one entry per block."""
    head_width: int = Field(default=64, ge=1)
    """Width of one attention head."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout of features of the residual branches, the same for all tokens of a sample; for small data sets."""
    variant: Literal["affine", "volume_preserving"] = "affine"
    """``affine``: every token is shifted and scaled. ``volume_preserving``: tokens are only shifted, and the latent has
    a learned standard deviation for each feature."""
    log_scale_bound: float | None = Field(default=None, gt=0)
    """Bound c of the log-scales of a block: a log-scale a becomes c tanh(a / c). This prevents overflow at high
    resolution. None: no bound."""

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
    """Selects this model; required."""
    levels: int = Field(ge=1)
    """Number of levels L; the image size must be a multiple of 2^levels."""
    steps_per_level: int = Field(ge=1)
    """Number K of steps on each level; a step is ActNorm, 1x1 convolution and coupling."""
    width: int = Field(default=512, ge=1)
    """Channels of the networks inside couplings."""
    coupling: Literal["affine", "additive"] = "affine"
    """``affine`` reaches better likelihoods; ``additive`` is the published choice for samples of large images."""
    convolution: Literal["dense", "lu"] = "lu"
    """Parametrisation of the 1x1 convolutions; ``lu`` has a cheap determinant, ``dense`` needs fewer operations."""
    log_scale_bound: float | None = Field(default=3.0, gt=0)
    """Smooth bound c of affine couplings, whose scale is sigmoid(c tanh(raw / c) + 2): for 3, between 0.27 and 0.99.
    None is the published form, whose samples may overflow. No effect on additive couplings."""


class NICEConfig(_FlowConfig):
    """NICE (arXiv 1410.8516); see `tarflow_scale.flows.nice`."""

    CAPABILITIES: ClassVar[Capabilities] = Capabilities(guidance=False)
    kind: Literal["nice"] = "nice"
    """Selects this model; required."""
    couplings: int = Field(default=4, ge=2)
    """Number of additive couplings, which alternate between even and odd dimensions."""
    width: int = Field(default=1000, ge=1)
    """Width of a hidden layer."""
    hidden_layers: int = Field(default=5, ge=1)
    """Hidden layers of the network of each coupling."""


class RealNVPConfig(_FlowConfig):
    """RealNVP (arXiv 1605.08803); see `tarflow_scale.flows.realnvp`."""

    CAPABILITIES: ClassVar[Capabilities] = Capabilities()
    BATCH_CAPABILITIES: ClassVar[Capabilities] = Capabilities(activations=("keep",), batch_statistics=True)
    kind: Literal["realnvp"] = "realnvp"
    """Selects this model; required."""
    levels: int = Field(ge=1)
    """Number of levels. Images: the size must be a multiple of 2^(levels - 1). Vectors: a level has four couplings."""
    width: int = Field(default=64, ge=1)
    """Channels of the residual networks on the first level; each squeeze doubles them. Vectors: width of the layers."""
    residual_blocks: int = Field(default=4, ge=1)
    """Residual blocks of the network of each coupling."""
    normalization: Literal["actnorm", "batch"] = "actnorm"
    """Normalization between couplings. ``actnorm``: a learned scale and shift, initialised from the first batch.
    ``batch``: the published batch normalization, with running statistics after training."""
    log_scale_bound: float = Field(default=2.0, gt=0)
    """Bound c of the log-scales, c tanh(raw / c)."""

    @property
    def capabilities(self) -> Capabilities:
        """What this flow can do, as it is configured."""
        return self.BATCH_CAPABILITIES if self.normalization == "batch" else self.CAPABILITIES


class _AutoregressiveConfig(_FlowConfig):
    CAPABILITIES: ClassVar[Capabilities] = Capabilities(guidance=False, separate_networks=False)

    transforms: int = Field(default=5, ge=1)
    """Number of autoregressive transformations; each reverses the order of dimensions of the one before it."""
    hidden_widths: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(512, 512), min_length=1)
    """Widths of the hidden layers of each masked network."""
    label_width: int = Field(default=16, ge=1)
    """Size of the label embedding at the input of every network."""


class MAFConfig(_AutoregressiveConfig):
    """Masked autoregressive flow (arXiv 1705.07057): scores in one pass; see `tarflow_scale.flows.autoregressive`."""

    kind: Literal["maf"] = "maf"
    """Selects this model; required."""


class IAFConfig(_AutoregressiveConfig):
    """Inverse autoregressive flow (arXiv 1606.04934): samples in one pass; see `tarflow_scale.flows.autoregressive`."""

    kind: Literal["iaf"] = "iaf"
    """Selects this model; required."""


class ContinuousConfig(_FlowConfig):
    """Continuous flow, FFJORD (arXiv 1810.01367); see `tarflow_scale.flows.continuous`."""

    CAPABILITIES: ClassVar[Capabilities] = Capabilities(
        activations=("keep",), guidance=False, separate_networks=False, divided_weights=False
    )
    kind: Literal["continuous"] = "continuous"
    """Selects this model; required."""
    width: int = Field(default=64, ge=1)
    """Channels of the hidden layers of the dynamics; for vectors, their width."""
    hidden_layers: int = Field(default=3, ge=1)
    """Hidden layers of the dynamics."""
    solver: Literal["dopri5", "bosh3", "rk4", "midpoint"] = "dopri5"
    """Adaptive (``dopri5``, ``bosh3``) or with fixed steps (``rk4``, ``midpoint``). Fixed steps are used only in
    training; later likelihoods and samples use an adaptive solver."""
    tolerance: float = Field(default=1e-5, gt=0)
    """Relative and absolute error tolerance of an adaptive solver; it also limits how exact the inverse is."""
    num_steps: int = Field(default=20, ge=1)
    """Number of steps of a solver with fixed steps."""
    gradients: Literal["adjoint", "direct"] = "adjoint"
    """``adjoint``: an adjoint solve, whose memory does not grow with the number of steps. ``direct``: backpropagation
    through the operations of the solver, exact for the computed result."""
    exact_trace_dims: int = Field(default=64, ge=0)
    """In evaluation the trace is exact up to this number of dimensions, and estimated with a probe above; in training
    it is always estimated."""
    max_evaluations: int = Field(default=2000, ge=1)
    """A solve that needs more evaluations of the dynamics fails."""

    @model_validator(mode="after")
    def _steps_fit(self) -> "ContinuousConfig":
        evaluations = {"rk4": 4, "midpoint": 2}.get(self.solver, 0) * self.num_steps
        if evaluations > self.max_evaluations:
            raise ValueError(
                f"max_evaluations must not be below the evaluations of num_steps (got {self.max_evaluations}, and "
                f"{self.num_steps} steps of {self.solver} take {evaluations}); raise it"
            )
        return self


ModelConfig = Annotated[
    TarFlowConfig | GlowConfig | NICEConfig | RealNVPConfig | MAFConfig | IAFConfig | ContinuousConfig,
    Field(discriminator="kind"),
]
"""The flow to train."""
