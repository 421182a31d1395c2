"""Build a flow from its configuration, and list its networks, which optimizers and compilers treat separately."""

import operator
from collections.abc import Callable, Sequence
from numbers import Integral

from torch import Tensor, nn

from tarflow_scale.config.model import ModelConfig
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

_FLOWS: dict[str, Callable[..., Flow]] = {
    "tarflow": TarFlow,
    "glow": Glow,
    "nice": NICE,
    "realnvp": RealNVP,
    "vector_realnvp": VectorRealNVP,
    "maf": Autoregressive,
    "iaf": Autoregressive,
    "continuous": Continuous,
}
"""The class of each ``model.kind``; RealNVP has a separate class for vectors."""


def build(
    config: ModelConfig,
    event_shape: Sequence[int],
    num_classes: int | None = None,
    num_conditions: int | None = None,
) -> Flow:
    """Build the flow that ``config`` describes; torch's global generator initialises its weights.

    Args:
        config: the section ``model``.
        event_shape: ``(C, H, W)`` of images, or ``(D,)`` of vectors.
        num_classes: number of classes of the data set, or None.
        num_conditions: number of condition values that each sample has instead of a label, or None.

    Raises:
        ConfigError: the model does not fit the data.
    """
    event_shape = _checked_shape(event_shape)
    for noun, number in (("num_classes", num_classes), ("num_conditions", num_conditions)):
        if number is not None and (not isinstance(number, Integral) or number < 0):
            raise ConfigError(f"{noun} must be an integer >= 1, or None (got {number!r}); correct it")
    if num_classes and num_conditions:
        raise ConfigError(
            f"a flow can be conditioned on labels or on numbers, not on both (got num_classes={num_classes} and "
            f"num_conditions={num_conditions}); pass only one of them"
        )
    rows = num_classes or num_conditions
    if config.class_conditional and not rows:
        raise ConfigError(
            "model.class_conditional needs a data set with classes, or vectors with condition values (got neither); "
            "set class_conditional to false"
        )
    image = event_shape if len(event_shape) == 3 else None
    if image is None and not config.capabilities.vectors:
        raise ConfigError(f"model.kind={config.kind} is for images (got vectors of shape {event_shape}); use maf")
    if image is None and config.dequantization is not None:
        raise ConfigError(f"model.dequantization is for images (got vectors of shape {event_shape}); remove it")
    classes = rows if config.class_conditional else None  # number of rows of the tables that conditions select
    kind = "vector_realnvp" if image is None and config.kind == "realnvp" else config.kind
    try:
        flow = _FLOWS[kind](event_shape, classes, config)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    flow.config = config
    if image is not None and config.dequantization is not None:  # last, so it does not change the other weights
        flow.dequantizer = Dequantizer(image[0], config.dequantization.couplings, config.dequantization.width)
    if config.class_conditional and num_conditions:
        flow.num_classes, flow.num_conditions = None, num_conditions
    return flow


def _checked_shape(event_shape: Sequence[int]) -> tuple[int, ...]:
    """The shape as a tuple of ints, which can be compared with shapes of tensors."""
    try:
        shape = tuple(operator.index(size) for size in event_shape)
    except TypeError:
        shape = ()
    if len(shape) not in (1, 3) or min(shape) < 1:
        raise ConfigError(
            f"event_shape must be (channels, height, width) or (dimensions,) (got {event_shape}); correct it"
        )
    return shape


Network = TransformerLayer | CouplingNetwork | ResidualNetwork | ResidualLayers | ShiftNetwork


def networks(module: nn.Module) -> list[Network]:
    """The networks that compute the parameters of a flow's maps. They take most of the time of a training step."""
    return [network for network in module.modules() if isinstance(network, Network)]


def matrices(module: nn.Module) -> list[Tensor]:
    """Weights of the linear maps inside the networks, except the output layers."""
    ends = [getattr(network, name, None) for network in networks(module) for name in ("out", "conv_out")]
    outer = {id(weight) for layer in ends if layer is not None for weight in layer.parameters()}
    return [
        weight
        for network in networks(module)
        for name, weight in network.named_parameters()
        if weight.ndim in (2, 4) and id(weight) not in outer and name != "class_embedding"
    ]


def compile_networks(module: nn.Module) -> None:
    """Compile each network in place. Names of parameters do not change; code around the networks is not compiled."""
    for network in networks(module):
        network.compile(dynamic=False)
