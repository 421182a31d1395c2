"""Configuration of the verb ``plan``: a recipe of ``train`` and the GPUs for it."""

from typing import Self

from pydantic import Field, model_validator

from tarflow_scale.config.autoencoder import TunedDecoderConfig
from tarflow_scale.config.base import Section
from tarflow_scale.config.data import ImageSize
from tarflow_scale.config.train import TrainConfig
from tarflow_scale.config.verb import Verb, flags_of

__all__ = ["VERB", "GpusConfig", "PlanConfig"]


class GpusConfig(Section):
    """The GPUs to plan for. Each key is also a flag, such as ``--gpus 8``."""

    gpus: int = Field(ge=1, le=65536)
    """Number of GPUs."""
    gpu: str
    """Kind of GPU: h200, h100, a100, b200, ..."""
    gpus_per_node: int = Field(default=8, ge=1)
    """Number of GPUs per machine."""
    network: float | None = Field(default=None, gt=0)
    """Network bandwidth between machines, in GB/s per GPU in one direction. The default is the bandwidth of NVIDIA's
    server with this GPU."""
    mfu: float | None = Field(default=None, gt=0, le=1)
    """Model FLOPs utilization of a GPU, 0 to 1. The default comes from published figures."""
    price: float | None = Field(default=None, gt=0)
    """Price of one GPU for one hour, in $."""
    curve: str | None = None
    """Path of a PNG to write, with a plot of the speed on 1 to 1,024 GPUs."""
    image_size: ImageSize | None = None
    """Size of the images in pixels: one side of a square, or height and width, such as 192x128; needed if there is no
    data set yet."""
    channels: int = Field(default=3, ge=1)
    """Number of channels of the images; used if there is no data set yet."""
    classes: int | None = Field(default=None, ge=0)
    """Number of classes of the images; used if there is no data set yet. 0 means no labels."""


class PlanConfig(TrainConfig):
    """Predict memory, speed, traffic and cost of a recipe of ``train``. Needs no GPU and no data set."""

    plan: GpusConfig

    @model_validator(mode="after")
    def _knows_the_size(self) -> Self:
        if isinstance(self.model, TunedDecoderConfig):
            raise ValueError(
                "plan needs a model that its section describes (got model.kind=decoder, the decoder of a registered "
                "version); plan the model.kind=autoencoder of that version"
            )
        return self


VERB = Verb(
    "verbs.plan",
    PlanConfig,
    "predict the memory, speed and cost of a recipe on GPUs",
    "tarflow-scale plan configs/train/imagenet64-conditional.yaml --gpus 8 --gpu h100 --image-size 64 --classes 1000",
    flags=flags_of(GpusConfig, "plan"),
)
