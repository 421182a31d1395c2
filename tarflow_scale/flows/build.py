"""Builds a flow from its configuration, and lists its networks, which optimizers and compilers treat separately."""

import operator
from collections.abc import Sequence
from numbers import Integral

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
from tarflow_scale.errors import ConfigError
from tarflow_scale.flows.attention import TransformerLayer
from tarflow_scale.flows.autoregressive import Autoregressive
from tarflow_scale.flows.continuous import Continuous
from tarflow_scale.flows.coupling import CouplingNetwork
from tarflow_scale.flows.dequantization import Dequantizer
from tarflow_scale.flows.flow import Flow
from tarflow_scale.flows.glow import Glow
from tarflow_scale.flows.nice import NICE, ShiftNetwork
from tarflow_scale.flows.realnvp import RealNVP, ResidualNetwork
from tarflow_scale.flows.tarflow import TarFlow
from tarflow_scale.flows.vector_realnvp import ResidualLayers, VectorRealNVP

__all__ = ["build"]


def build(
    config: ModelConfig,
    event_shape: Sequence[int],
    num_classes: int | None = None,
    num_conditions: int | None = None,
) -> Flow:
    """Build the flow that ``config`` describes, freshly initialised from torch's global generator.

    Args:
        config: the section ``model``.
        event_shape: ``(C, H, W)`` of images, or ``(D,)`` of vectors.
        num_classes: classes of the data set, or None.
        num_conditions: numbers that condition a sample of the data set in place of a label, or None.

    Raises:
        ConfigError: when the model does not fit the data.
    """
    event_shape = _checked_shape(event_shape)
    for noun, number in (("num_classes", num_classes), ("num_conditions", num_conditions)):
        if number is not None and (not isinstance(number, Integral) or number < 0):
            raise ConfigError(f"{noun} must be an integer >= 1, or None (got {number!r}); correct it")
    if num_classes and num_conditions:
        raise ConfigError(
            f"a flow is conditioned on labels or on numbers (got {num_classes} classes and {num_conditions} numbers); "
            f"give either"
        )
    rows = num_classes or num_conditions
    if config.class_conditional and not rows:
        raise ConfigError(
            "model.class_conditional needs a data set with classes, or vectors given with numbers (got none); set it "
            "to false"
        )
    image = event_shape if len(event_shape) == 3 else None
    if image is None and not config.capabilities.vectors:
        raise ConfigError(f"model.kind={config.kind} is for images (got events of shape {event_shape}); use maf")
    if image is None and config.dequantization is not None:
        raise ConfigError(f"model.dequantization is for images (got events of shape {event_shape}); leave it out")
    settings = config.model_dump(exclude={"kind", "class_conditional", "dequantization"})
    classes = rows if config.class_conditional else None  # rows of the tables that conditions select
    try:
        match config:
            case TarFlowConfig():
                assert image is not None
                flow = TarFlow(image, classes, **settings)
            case GlowConfig():
                assert image is not None
                flow = Glow(image, classes, **settings)
            case NICEConfig():
                flow = NICE(event_shape, classes, **settings)
            case RealNVPConfig() if image is None:
                flow = VectorRealNVP(event_shape, classes, **settings)
            case RealNVPConfig():
                assert image is not None
                flow = RealNVP(image, classes, **settings)
            case MAFConfig() | IAFConfig():
                flow = Autoregressive(event_shape, classes, inverse=config.kind == "iaf", **settings)
            case ContinuousConfig():
                flow = Continuous(event_shape, classes, **settings)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    flow.config = config
    if image is not None and config.dequantization is not None:  # last, so that all else starts as without it
        flow.dequantizer = Dequantizer(image[0], config.dequantization.couplings, config.dequantization.width)
    if config.class_conditional and num_conditions:
        flow.num_classes, flow.num_conditions = None, num_conditions
    return flow


def _checked_shape(event_shape: Sequence[int]) -> tuple[int, ...]:
    """A tuple of ints, so that it can be compared with shapes of tensors."""
    try:
        shape = tuple(operator.index(size) for size in event_shape)
    except TypeError:
        shape = ()
    if len(shape) not in (1, 3) or min(shape) < 1:
        raise ConfigError(f"events have shape (channels, height, width) or (values,) (got {event_shape}); correct it")
    return shape


Network = TransformerLayer | CouplingNetwork | ResidualNetwork | ResidualLayers | ShiftNetwork


def networks(module: nn.Module) -> list[Network]:
    """The networks that compute the parameters of a flow's maps. They take most of the time of a training step."""
    return [one for one in module.modules() if isinstance(one, Network)]


def matrices(module: nn.Module) -> list[Tensor]:
    """Weights of the linear maps inside the networks, except the output layers."""
    own = (ShiftNetwork, ResidualLayers)
    last = (one.out if isinstance(one, own) else getattr(one, "conv_out", None) for one in networks(module))
    outer = {id(weight) for layer in last if layer is not None for weight in layer.parameters()}
    return [
        weight
        for one in networks(module)
        for name, weight in one.named_parameters()
        if weight.ndim in (2, 4) and id(weight) not in outer and name != "class_embedding"
    ]


def compile_networks(module: nn.Module) -> None:
    """Compile each network in place; names of parameters stay, and the code around the networks is not compiled."""
    for one in networks(module):
        one.compile(dynamic=False)
