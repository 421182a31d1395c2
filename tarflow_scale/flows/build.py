"""From a configuration to a flow."""

from tarflow_scale.config import GlowConfig, ModelConfig, TarFlowConfig
from tarflow_scale.errors import ConfigError
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
