"""What a run trains: a model with its objective, its previews and its files.

`tarflow_scale.verbs.train.flows` and `tarflow_scale.verbs.train.autoencoders` implement `Subject`; the rest of the verb
handles both alike.
"""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from tarflow_scale.capacity.memory import ModelSize
from tarflow_scale.config.autoencoder import ConvolutionalConfig
from tarflow_scale.config.model import FlowConfig
from tarflow_scale.records import PixelFormat
from tarflow_scale.training.objective import Objective

__all__ = ["Subject"]


class Subject(ABC):
    """What a run trains."""

    size: ModelSize
    """Number of parameters."""
    counted: FlowConfig | ConvolutionalConfig | None
    """Section from which operations and memory are computed; None if they are not known."""
    pixels: PixelFormat
    """How stored pixels are converted to floats; it is registered with the model."""
    next_step: str
    """What the user may do with the registered model, for the last line of a run."""
    identity: dict[str, Any]
    """Settings that must not change when a run continues, besides those that all runs have."""
    lineage: dict[str, Any]
    """Fields of the registered version that name its origin."""

    @abstractmethod
    def objective(self) -> Objective[Any]:
        """Build the model with its objective; torch's global generator initializes the weights."""

    @abstractmethod
    def picture(self, weights: dict[str, Tensor]) -> bytes | None:
        """A PNG that shows what a model with these averaged weights can do; None if it cannot be shown.

        Raises:
            NumericsError, ConfigError: the picture cannot be drawn.
        """

    @abstractmethod
    def files(self, weights: dict[str, Tensor]) -> dict[str, bytes]:
        """The files of the model with these averaged weights, by name."""
