"""All flows and layers that the conformance suite checks; a new one is listed here once.

Weights are moved away from their initial values, because a zero-initialised coupling is the identity, for which no test
of a log-determinant can fail.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tarflow_scale.config.model import (
    ContinuousConfig,
    GlowConfig,
    IAFConfig,
    MAFConfig,
    ModelConfig,
    NICEConfig,
    RealNVPConfig,
    TarFlowConfig,
)
from tarflow_scale.flows import Flow, Glow, TarFlow, build
from tarflow_scale.flows.coupling import ActNorm, Coupling, InvertibleConv, Layer, Normalization
from tarflow_scale.flows.realnvp import BatchNorm, MaskedCoupling
from tests.flows import conformance

NUM_CLASSES = 3


@dataclass(frozen=True)
class FlowCase:
    """A small flow.

    Args:
        name: how the test is called.
        config: what is built.
        event_shape: ``(C, H, W)``, small enough for a whole Jacobian.
        density_shape: an event of 2 to 4 dimensions on which the density is integrated.
        cautious: fragments of names of parameters that move less, lest the flow cannot be inverted in floats.
        activations: the ways of the backward pass that the flow has.
        inverse, log_det: how far the inverse and the log-determinant may be off; those of a solver are not exact.
        same_in_training: whether training and evaluation compute the same.
        guided: whether the flow takes guidance.
    """

    name: str
    config: ModelConfig
    event_shape: tuple[int, int, int]
    density_shape: tuple[int, int, int]
    cautious: tuple[str, ...]
    activations: tuple[str, ...]
    inverse: float = conformance.EXACT
    log_det: float = conformance.LOG_DET
    same_in_training: bool = True
    guided: bool = True

    @property
    def num_classes(self) -> int | None:
        return NUM_CLASSES if self.config.class_conditional else None

    def fresh(self, event_shape: tuple[int, int, int] | None = None) -> Flow:
        torch.manual_seed(0)
        return build(self.config, event_shape or self.event_shape, self.num_classes)

    def flow(self, dtype: torch.dtype = torch.float64, event_shape: tuple[int, int, int] | None = None) -> Flow:
        """The flow with moved weights, in evaluation mode."""
        flow = self.fresh(event_shape).double()
        flow.initialize(*self.data(16, event_shape))
        moved(flow, self.cautious)
        return flow.to(dtype).eval()

    def dense(self) -> Flow:
        """The flow for an event of few dimensions, over which its density can be integrated."""
        smaller = {"tarflow": {"patch_size": 1}, "glow": {"levels": 1}, "realnvp": {"levels": 1}}
        config = self.config.model_copy(update=smaller.get(self.config.kind, {}))
        return replace(self, config=config, event_shape=self.density_shape).flow()

    def data(
        self, batch: int, event_shape: tuple[int, int, int] | None = None, dtype: torch.dtype = torch.float64
    ) -> tuple[Tensor, Tensor | None]:
        """Images inside [-1, 1], and labels, some of which are dropped."""
        generator = torch.Generator().manual_seed(1)
        x = 2 * torch.rand(batch, *(event_shape or self.event_shape), dtype=torch.float64, generator=generator) - 1
        y = torch.arange(batch) % (NUM_CLASSES + 1) - 1 if self.num_classes else None
        return x.to(dtype), y


@torch.no_grad()
def moved(module: nn.Module, cautious: tuple[str, ...]) -> None:
    """Add noise to every parameter."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in module.named_parameters():
        size = 0.03 if any(part in name for part in cautious) else 0.2
        parameter.add_(size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter))


def tarflow(name: str, **settings: object) -> FlowCase:
    base = {"kind": "tarflow", "patch_size": 2, "width": 16, "head_width": 8, "layers_per_block": (1, 2)}
    return FlowCase(
        name=f"tarflow_{name}",
        config=TarFlowConfig.model_validate(base | settings),
        event_shape=(1, 4, 6),
        density_shape=(1, 1, 2),
        cautious=("proj_out",),
        activations=("keep", "checkpoint"),
    )


def glow(name: str, **settings: object) -> FlowCase:
    base = {"kind": "glow", "levels": 2, "steps_per_level": 2, "width": 6}
    return FlowCase(
        name=f"glow_{name}",
        config=GlowConfig.model_validate(base | settings),
        event_shape=(1, 8, 4),
        density_shape=(1, 2, 2),
        cautious=("",),
        activations=("keep", "checkpoint", "rebuild"),
    )


def realnvp(name: str, **settings: object) -> FlowCase:
    base = {"kind": "realnvp", "levels": 2, "width": 4, "residual_blocks": 1}
    batch = settings.get("normalization") == "batch"
    return FlowCase(
        name=f"realnvp_{name}",
        config=RealNVPConfig.model_validate(base | settings),
        event_shape=(1, 4, 6),
        density_shape=(1, 1, 2),
        cautious=("",),
        activations=("keep",) if batch else ("keep", "checkpoint"),
        same_in_training=not batch,
    )


def nice(name: str, **settings: object) -> FlowCase:
    base = {"kind": "nice", "couplings": 3, "width": 8, "hidden_layers": 2}
    return FlowCase(
        name=f"nice_{name}",
        config=NICEConfig.model_validate(base | settings),
        event_shape=(1, 3, 5),
        density_shape=(1, 1, 2),
        cautious=(),
        activations=("keep", "checkpoint"),
        guided=False,
    )


def autoregressive(kind: str, name: str, **settings: object) -> FlowCase:
    base = {"kind": kind, "transforms": 2, "hidden_widths": (16, 12), "label_width": 3}
    config: type[ModelConfig] = {"maf": MAFConfig, "iaf": IAFConfig}[kind]  # type: ignore[assignment]
    return FlowCase(
        name=f"{kind}_{name}",
        config=config.model_validate(base | settings),
        event_shape=(1, 2, 4),
        density_shape=(1, 1, 2),
        cautious=("",),
        activations=("keep", "checkpoint"),
        guided=False,
    )


def continuous(name: str, **settings: object) -> FlowCase:
    base = {"kind": "continuous", "width": 6, "hidden_layers": 1, "tolerance": 1e-8}
    return FlowCase(
        name=f"continuous_{name}",
        config=ContinuousConfig.model_validate(base | settings),
        event_shape=(1, 2, 4),
        density_shape=(1, 1, 2),
        cautious=(),
        activations=("keep",),
        inverse=1e-5,
        log_det=1e-5,
        same_in_training=False,
        guided=False,
    )


STARFLOW = {
    "width": 24, "deep_width": 48, "head_width": 24, "start_token": True, "positions": "rotary", "scale": "softplus",
    "output_bound": 3.0, "final_norm": True, "first_order": "backward", "conditioning": "prefix",
    "conditioned_blocks": "last",
}  # fmt: skip
"""Options of the published STARFlow, small."""
GEMMA = {
    "norm": "rms", "qk_norm": True, "mlp": "gated", "queries_per_key": 2, "positions": "rotary", "start_token": True,
}  # fmt: skip
"""The remaining options of layers."""

FLOWS = [
    tarflow("affine", class_conditional=False),
    tarflow("conditional"),
    tarflow("deep_shallow", layers_per_block=(1, 1, 3)),
    tarflow("volume_preserving", variant="volume_preserving"),
    tarflow("bounded", log_scale_bound=0.5, class_conditional=False),
    tarflow("logit", logit_alpha=0.05, class_conditional=False),
    tarflow("prefix", conditioning="prefix"),
    tarflow("starflow", **STARFLOW),
    tarflow("gemma", **GEMMA),
    *(
        glow(
            f"{convolution}_{coupling}{'_conditional' if conditional else ''}",
            convolution=convolution,
            coupling=coupling,
            class_conditional=conditional,
        )
        for convolution in ("dense", "lu")
        for coupling in ("affine", "additive")
        for conditional in (True, False)
    ),
    glow("published_scale", log_scale_bound=None, class_conditional=False),
    glow("logit", logit_alpha=1e-3, class_conditional=False),
    realnvp("conditional"),
    realnvp("unconditional", class_conditional=False),
    realnvp("batch", normalization="batch"),
    realnvp("logit", logit_alpha=0.05, class_conditional=False),
    nice("conditional"),
    nice("unconditional", class_conditional=False),
    nice("logit", logit_alpha=0.05, class_conditional=False),
    *(autoregressive(kind, "conditional") for kind in ("maf", "iaf")),
    *(autoregressive(kind, "logit", logit_alpha=0.05, class_conditional=False) for kind in ("maf", "iaf")),
    continuous("conditional"),
    continuous("direct", gradients="direct", solver="rk4", num_steps=20),
    continuous("logit", logit_alpha=0.05, class_conditional=False),
]
"""The flows."""


@dataclass(frozen=True)
class LayerCase:
    """An invertible layer of C channels."""

    name: str
    make: Callable[[int], Layer]

    def layer(self, channels: int, size: float = 0.1) -> Layer:
        """The layer with moved weights, in float64."""
        torch.manual_seed(0)
        layer = self.make(channels).double()
        x = feature_maps(8, channels)
        hooks = [
            norm.register_forward_pre_hook(lambda module, arguments: module.initialize(arguments[0]))
            for norm in layer.modules()
            if isinstance(norm, Normalization)
        ]
        layer(x)
        for hook in hooks:
            hook.remove()
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.add_(size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        return layer


def feature_maps(batch: int, channels: int, height: int = 2, width: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(batch, channels, height, width, dtype=torch.float64, generator=generator)


LAYERS = [
    LayerCase("actnorm", ActNorm),
    LayerCase("conv_dense", lambda channels: InvertibleConv(channels, "dense")),
    LayerCase("conv_lu", lambda channels: InvertibleConv(channels, "lu")),
    LayerCase("coupling_affine", lambda channels: Coupling(channels, 5, "affine")),
    LayerCase("coupling_bounded", lambda channels: Coupling(channels, 5, "affine", bound=0.7)),
    LayerCase("coupling_additive", lambda channels: Coupling(channels, 5, "additive")),
    LayerCase("batch_norm", lambda channels: BatchNorm(channels).eval()),
    LayerCase("masked_checkerboard", lambda channels: MaskedCoupling(channels, "checkerboard", 1, 5, 1, bound=2.0)),
    LayerCase("masked_channels", lambda channels: MaskedCoupling(channels, "channels", 0, 5, 1, bound=2.0)),
]
"""The layers."""


def moment_matched(name: str) -> Flow:
    """A flow with density N(0, 1/3) in every pixel, which has the mean and variance of U(-1, 1)."""
    log_std = 0.5 * math.log(1 / 3)
    torch.manual_seed(0)
    with torch.no_grad():
        if name == "tarflow":
            sizes = {"patch_size": 2, "width": 8, "layers_per_block": (1,), "head_width": 8}
            tar = TarFlow((1, 2, 2), None, TarFlowConfig(variant="volume_preserving", **sizes)).double()  # type: ignore[arg-type]
            assert tar.log_std is not None
            tar.log_std.fill_(log_std)
            return tar
        flow = Glow((1, 2, 2), None, GlowConfig(levels=1, steps_per_level=1, width=4, coupling="additive")).double()
        flow.initialize(torch.randn(8, 1, 2, 2, dtype=torch.float64))
        step = flow.levels[0].steps[0]  # type: ignore[union-attr, index]
        step.norm.bias.zero_()
        step.norm.log_scale.fill_(-log_std)
        return flow  # the 1x1 convolution is a rotation, which a sum of squares does not notice
