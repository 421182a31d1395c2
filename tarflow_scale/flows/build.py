"""From a configuration to a flow; and the networks inside it, which optimizers and compilers treat apart."""

from torch import Tensor, nn

from tarflow_scale.config import GlowConfig, ModelConfig, TarFlowConfig
from tarflow_scale.errors import ConfigError
from tarflow_scale.flows.attention import TransformerLayer
from tarflow_scale.flows.coupling import CouplingNetwork
from tarflow_scale.flows.flow import Flow
from tarflow_scale.flows.glow import Glow
from tarflow_scale.flows.tarflow import TarFlow

__all__ = ["build"]


def build(config: ModelConfig, event_shape: tuple[int, int, int], num_classes: int | None = None) -> Flow:
    """Build the flow that ``config`` describes, freshly initialised from torch's global generator.

    Args:
        config: the section ``model``.
        event_shape: ``(C, H, W)`` of the images.
        num_classes: classes of the data set, or None.

    Raises:
        ConfigError: when the model does not fit the images.
    """
    if config.class_conditional and not num_classes:
        raise ConfigError("model.class_conditional needs a data set with classes (got none); set it to false")
    settings = config.model_dump(exclude={"kind", "class_conditional"})
    classes = num_classes if config.class_conditional else None
    try:
        match config:
            case TarFlowConfig():
                flow = TarFlow(event_shape, classes, **settings)
            case GlowConfig():
                flow = Glow(event_shape, classes, **settings)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    flow.config = config
    return flow


def networks(module: nn.Module) -> list[TransformerLayer | CouplingNetwork]:
    """The transformer layers and coupling networks inside a module: where a step spends its time."""
    return [one for one in module.modules() if isinstance(one, TransformerLayer | CouplingNetwork)]


def matrices(module: nn.Module) -> list[Tensor]:
    """Weights of the linear maps inside the networks, but for those that make the parameters of an affine map."""
    outer = {id(one.conv_out.weight) for one in networks(module) if isinstance(one, CouplingNetwork)}
    return [p for one in networks(module) for p in one.parameters() if p.ndim in (2, 4) and id(p) not in outer]


def compile_networks(module: nn.Module) -> None:
    """Compile each network in place; names of parameters stay, and what is around the networks runs as it is."""
    for one in networks(module):
        one.compile(dynamic=False)
