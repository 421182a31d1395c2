"""From a configuration to a flow."""

from tarflow_scale.config import ModelConfig
from tarflow_scale.errors import ConfigError
from tarflow_scale.flows.flow import Flow
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
    classes = num_classes if config.class_conditional else None
    if config.class_conditional and not num_classes:
        raise ConfigError("model.class_conditional needs a data set with classes (got none); set it to false")
    try:
        flow = TarFlow(
            event_shape,
            classes,
            patch_size=config.patch_size,
            width=config.width,
            layers_per_block=config.layers_per_block,
            head_width=config.head_width,
            dropout=config.dropout,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    flow.config = config
    return flow
