"""The section ``model``: one class for each kind of flow, with its capabilities.

The defaults of all flows are here. Code outside the module of a flow should test `Capabilities`, not ``kind``.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from tarflow_scale.config.base import Section

__all__ = [
    "Activations",
    "Capabilities",
    "ContinuousConfig",
    "DequantizationConfig",
    "FlowConfig",
    "GlowConfig",
    "IAFConfig",
    "MAFConfig",
    "ModelConfig",
    "NICEConfig",
    "RealNVPConfig",
    "TarFlowConfig",
]


Activations = Literal["keep", "checkpoint", "rebuild"]
"""How the backward pass gets activations. ``keep``: from memory. ``checkpoint``: by running layers again from their
stored inputs. ``rebuild``: by inverting layers, starting from their outputs."""


@dataclass(frozen=True)
class Capabilities:
    """What a kind of flow can do.

    Args:
        vectors: whether the flow can also model vectors ``(D,)``, in addition to images ``(C, H, W)``.
        activations: supported values of ``parallelism.activations``.
        guidance: whether sampling supports guidance.
        separate_networks: whether the flow contains networks that can be compiled separately; Muon can then update the
            matrices of these networks.
        divided_weights: whether the weights can be divided among ranks (ZeRO stage 3).
        batch_statistics: whether training normalizes by batch statistics, so that results depend on the micro batch
            size.
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
    """Number of affine couplings. They change the two colours of a checkerboard in turn, so after two couplings every
    pixel has changed."""
    width: int = Field(default=32, ge=1)
    """Number of channels of the network in each coupling."""


class _FlowConfig(Section):
    CAPABILITIES: ClassVar[Capabilities] = Capabilities()
    OMITTED_AT_DEFAULT: ClassVar[frozenset[str]] = frozenset({"dequantization"})

    class_conditional: bool = True
    """Whether the flow is conditioned on labels, or for vectors on their condition values."""
    logit_alpha: float | None = Field(default=None, gt=0, lt=0.5)
    """Transform pixels p on [0, 1] by logit(alpha + (1 - 2 alpha) p) before the flow, which spreads out values near
    black and white. Use it for images that are mostly black or white, with uniform noise. None leaves pixels on
    [-1, 1]."""
    dequantization: DequantizationConfig | None = None
    """Variational dequantization: a small flow, conditioned on the image, transforms the uniform noise and is trained
    together with the model, which tightens the bound on bits/dim. None keeps uniform noise."""

    @property
    def capabilities(self) -> Capabilities:
        """Capabilities of the flow with this configuration."""
        return self.CAPABILITIES


class TarFlowConfig(_FlowConfig):
    """TarFlow (arXiv 2412.06329), with the options of STARFlow (arXiv 2506.06276) from ``output_bound`` on.

    See `tarflow_scale.flows.tarflow`.
    """

    CAPABILITIES: ClassVar[Capabilities] = Capabilities(vectors=False)
    kind: Literal["tarflow"] = "tarflow"
    patch_size: int = Field(ge=1)
    """Side of a patch in pixels; must divide the image size."""
    width: int = Field(ge=1)
    """Number of channels of the transformer; a multiple of ``head_width``."""
    layers_per_block: tuple[Annotated[int, Field(ge=1)], ...] = Field(min_length=1)
    """Number of transformer layers in each block, in the order from data to noise. The length of the list is the number
    of blocks."""
    head_width: int = Field(default=64, ge=1)
    """Number of channels of an attention head."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout probability in the residual branches; a feature is dropped for all tokens of a sample together. Useful
    for small data sets."""
    variant: Literal["affine", "volume_preserving"] = "affine"
    """``affine``: tokens are shifted and scaled. ``volume_preserving``: tokens are only shifted, and each feature of
    the latent has a learned standard deviation."""
    log_scale_bound: float | None = Field(default=None, gt=0)
    """Bound c of the log-scales in a block: a log-scale a becomes c tanh(a / c), which prevents overflow at high
    resolution. None sets no bound."""
    output_bound: float | None = Field(default=None, gt=0)
    """Bound c of all outputs of a block, log-scales and means, as in ``log_scale_bound``."""
    scale: Literal["exp", "softplus"] = "exp"
    """Scale of a token as a function of the output a: exp(a), or softplus(a + log(e - 1)), which grows linearly."""
    start_token: bool = False
    """Put a learned token before the first one, so that a block also transforms its first token."""
    first_order: Literal["forward", "backward"] = "forward"
    """Order in which the first block reads the tokens; the order alternates from block to block."""
    positions: Literal["learned", "rotary"] = "learned"
    """``learned``: a table with a row for each token. ``rotary``: queries and keys are rotated by the row and column of
    a token, so that the flow can also sample images of other sizes."""
    norm: Literal["layer", "rms"] = "layer"
    """Normalization before attention and MLP: LayerNorm or RMSNorm."""
    final_norm: bool = False
    """Whether an RMSNorm precedes the output layer of a block."""
    qk_norm: bool = False
    """Whether an RMSNorm is applied to each query and key."""
    mlp: Literal["gelu", "gated"] = "gelu"
    """``gelu``: two layers with a GELU. ``gated``: the hidden values are gelu(gate) * value, with the tanh GELU."""
    queries_per_key: int = Field(default=1, ge=1)
    """Number of query heads that share a key head and a value head (grouped-query attention, arXiv 2305.13245). The
    cache that decoding reads is smaller by this factor."""
    deep_width: int | None = Field(default=None, ge=1)
    """Width of the last block, the one next to the noise; None for ``width``."""
    conditioning: Literal["added", "prefix"] = "added"
    """How a block receives its condition. ``added``: its embedding is added to every token. ``prefix``: its embedding
    is a token before all others, and dropped labels have an embedding of their own."""
    conditioned_blocks: Literal["all", "last"] = "all"
    """Blocks that receive the condition. ``last``: only the block next to the noise; guidance then acts there only."""

    OMITTED_AT_DEFAULT: ClassVar[frozenset[str]] = _FlowConfig.OMITTED_AT_DEFAULT | {
        "output_bound", "scale", "start_token", "first_order", "positions", "norm", "final_norm", "qk_norm", "mlp",
        "queries_per_key", "deep_width", "conditioning", "conditioned_blocks",
    }  # fmt: skip

    @property
    def block_widths(self) -> tuple[int, ...]:
        """Width of each block, in the order from data to noise."""
        return (self.width,) * (len(self.layers_per_block) - 1) + (self.deep_width or self.width,)

    def has_condition(self, block: int) -> bool:
        """Whether the block with this index, from data to noise, receives the condition, if there is one."""
        last = block == len(self.layers_per_block) - 1
        return self.class_conditional and (last or self.conditioned_blocks == "all")

    def has_prefix(self, block: int) -> bool:
        """Whether a block with a condition has a token for it."""
        return self.has_condition(block) and self.conditioning == "prefix"

    @model_validator(mode="after")
    def _fits(self) -> "TarFlowConfig":
        for name, width in (("width", self.width), ("deep_width", self.deep_width or self.width)):
            if width % self.head_width:
                raise ValueError(
                    f"{name} must be a multiple of head_width (got {width} and {self.head_width}); change either"
                )
            if width // self.head_width % self.queries_per_key:
                raise ValueError(
                    f"the number of heads, {name} / head_width, must be a multiple of queries_per_key (got "
                    f"{width // self.head_width} and {self.queries_per_key}); change either"
                )
        if self.variant == "volume_preserving" and (self.log_scale_bound is not None or self.scale != "exp"):
            got = self.scale if self.log_scale_bound is None else self.log_scale_bound
            name = "scale" if self.log_scale_bound is None else "log_scale_bound"
            raise ValueError(f"{name} has no effect on variant=volume_preserving (got {got}); remove it")
        if self.log_scale_bound is not None and self.output_bound is not None:
            raise ValueError(
                f"output_bound also bounds log-scales, so log_scale_bound must not be set with it (got "
                f"{self.output_bound} and {self.log_scale_bound}); remove log_scale_bound"
            )
        if self.positions == "rotary" and self.head_width % 4:
            raise ValueError(
                f"positions=rotary needs a head_width that is a multiple of 4 (got {self.head_width}); change either"
            )
        if self.conditioning == "prefix" and self.positions == "rotary" and self.head_width < 24:
            raise ValueError(
                f"conditioning=prefix with positions=rotary needs a head_width of at least 24, because 16 of its "
                f"features stand for the prefix (got {self.head_width}); raise head_width"
            )
        unused = [name for name in ("conditioning", "conditioned_blocks") if self._differs(name)]
        if unused and not self.class_conditional:
            raise ValueError(
                f"{unused[0]} has no effect on class_conditional=false (got {getattr(self, unused[0])}); remove it"
            )
        return self

    def _differs(self, name: str) -> bool:
        return bool(getattr(self, name) != type(self).model_fields[name].default)


class GlowConfig(_FlowConfig):
    """Glow (arXiv 1807.03039); see `tarflow_scale.flows.glow`."""

    CAPABILITIES: ClassVar[Capabilities] = Capabilities(vectors=False, activations=("keep", "checkpoint", "rebuild"))
    kind: Literal["glow"] = "glow"
    levels: int = Field(ge=1)
    """Number of levels L; the image size must be a multiple of 2^levels."""
    steps_per_level: int = Field(ge=1)
    """Number K of steps on each level. A step consists of ActNorm, a 1x1 convolution and a coupling."""
    width: int = Field(default=512, ge=1)
    """Number of channels of the network in each coupling."""
    coupling: Literal["affine", "additive"] = "affine"
    """``affine`` reaches better likelihoods; ``additive`` is the published choice for sampling large images."""
    convolution: Literal["dense", "lu"] = "lu"
    """Parametrization of the 1x1 convolutions: ``lu`` has a cheap determinant, ``dense`` needs fewer operations."""
    log_scale_bound: float | None = Field(default=3.0, gt=0)
    """Bound c of affine couplings: their scale is sigmoid(c tanh(raw / c) + 2), for c = 3 between 0.27 and 0.99.
    None is the published form, with which samples may overflow. No effect on additive couplings."""


class NICEConfig(_FlowConfig):
    """NICE (arXiv 1410.8516); see `tarflow_scale.flows.nice`."""

    CAPABILITIES: ClassVar[Capabilities] = Capabilities(guidance=False)
    kind: Literal["nice"] = "nice"
    couplings: int = Field(default=4, ge=2)
    """Number of additive couplings; they change even and odd dimensions in turn."""
    width: int = Field(default=1000, ge=1)
    """Number of units in a hidden layer."""
    hidden_layers: int = Field(default=5, ge=1)
    """Number of hidden layers of the network in each coupling."""


class RealNVPConfig(_FlowConfig):
    """RealNVP (arXiv 1605.08803); see `tarflow_scale.flows.realnvp`."""

    CAPABILITIES: ClassVar[Capabilities] = Capabilities()
    BATCH_CAPABILITIES: ClassVar[Capabilities] = Capabilities(activations=("keep",), batch_statistics=True)
    kind: Literal["realnvp"] = "realnvp"
    levels: int = Field(ge=1)
    """Number of levels. The size of images must be a multiple of 2^(levels - 1). For vectors, a level has four
    couplings."""
    width: int = Field(default=64, ge=1)
    """Number of channels of the residual networks on the first level; each squeeze doubles it. For vectors, the number
    of units in a layer."""
    residual_blocks: int = Field(default=4, ge=1)
    """Number of residual blocks of the network in each coupling."""
    normalization: Literal["actnorm", "batch"] = "actnorm"
    """Normalization between couplings. ``actnorm``: a learned scale and shift, initialized from the first batch.
    ``batch``: the published batch normalization, which uses running statistics after training."""
    log_scale_bound: float = Field(default=2.0, gt=0)
    """Bound c of the log-scales, which are c tanh(raw / c)."""

    @property
    def capabilities(self) -> Capabilities:
        """Capabilities of the flow with this configuration."""
        return self.BATCH_CAPABILITIES if self.normalization == "batch" else self.CAPABILITIES


class _AutoregressiveConfig(_FlowConfig):
    CAPABILITIES: ClassVar[Capabilities] = Capabilities(guidance=False, separate_networks=False)

    transforms: int = Field(default=5, ge=1)
    """Number of autoregressive transformations; each reverses the order of the dimensions."""
    hidden_widths: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(512, 512), min_length=1)
    """Number of units in each hidden layer of a masked network."""
    label_width: int = Field(default=16, ge=1)
    """Size of the label embedding at the input of each network."""


class MAFConfig(_AutoregressiveConfig):
    """Masked autoregressive flow (arXiv 1705.07057): fast likelihoods; see `tarflow_scale.flows.autoregressive`."""

    kind: Literal["maf"] = "maf"


class IAFConfig(_AutoregressiveConfig):
    """Inverse autoregressive flow (arXiv 1606.04934): fast sampling; see `tarflow_scale.flows.autoregressive`."""

    kind: Literal["iaf"] = "iaf"


class ContinuousConfig(_FlowConfig):
    """Continuous flow, FFJORD (arXiv 1810.01367); see `tarflow_scale.flows.continuous`."""

    CAPABILITIES: ClassVar[Capabilities] = Capabilities(
        activations=("keep",), guidance=False, separate_networks=False, divided_weights=False
    )
    kind: Literal["continuous"] = "continuous"
    width: int = Field(default=64, ge=1)
    """Number of channels in the hidden layers of the dynamics network; for vectors, number of units."""
    hidden_layers: int = Field(default=3, ge=1)
    """Number of hidden layers of the dynamics network."""
    solver: Literal["dopri5", "bosh3", "rk4", "midpoint"] = "dopri5"
    """ODE solver in training: adaptive (``dopri5``, ``bosh3``) or with fixed steps (``rk4``, ``midpoint``). Evaluation
    and sampling always use an adaptive solver."""
    tolerance: float = Field(default=1e-5, gt=0)
    """Relative and absolute error tolerance of the adaptive solver; it limits the accuracy of the inverse."""
    num_steps: int = Field(default=20, ge=1)
    """Number of steps of a solver with fixed steps."""
    gradients: Literal["adjoint", "direct"] = "adjoint"
    """``adjoint``: the adjoint method; its memory does not grow with the number of steps. ``direct``: backpropagation
    through the operations of the solver, which gives exact gradients of the computed result."""
    exact_trace_dims: int = Field(default=64, ge=0)
    """Maximum number of dimensions for which evaluation computes the exact trace. With more dimensions, and always in
    training, the trace is estimated."""
    max_evaluations: int = Field(default=2000, ge=1)
    """Maximum number of evaluations of the dynamics in one solve; a solve that needs more fails."""

    @model_validator(mode="after")
    def _steps_fit(self) -> "ContinuousConfig":
        evaluations = {"rk4": 4, "midpoint": 2}.get(self.solver, 0) * self.num_steps
        if evaluations > self.max_evaluations:
            raise ValueError(
                f"max_evaluations must be enough for num_steps (got {self.max_evaluations}, and {self.num_steps} "
                f"steps of {self.solver} need {evaluations} evaluations); raise it"
            )
        return self


FlowConfig = TarFlowConfig | GlowConfig | NICEConfig | RealNVPConfig | MAFConfig | IAFConfig | ContinuousConfig
"""A flow of any kind."""
ModelConfig = Annotated[FlowConfig, Field(discriminator="kind")]
"""A flow of any kind, selected by its key ``kind``."""
