"""Planning: a recipe of ``train`` in, what it needs of GPUs out."""

from pydantic import Field

from tarflow_scale.config.base import Section
from tarflow_scale.config.train import TrainConfig
from tarflow_scale.config.verb import Verb, flags_of

__all__ = ["VERB", "GpusConfig", "PlanConfig"]


class GpusConfig(Section):
    """The GPUs that the recipe is planned for; each key is a flag too, such as ``--gpus 8``."""

    gpus: int = Field(ge=1, le=65536)
    """GPUs in all."""
    gpu: str
    """Their kind: h200, h100, a100, b200, ..."""
    gpus_per_node: int = Field(default=8, ge=1)
    """GPUs of a machine."""
    network: float | None = Field(default=None, gt=0)
    """GB/s of each GPU to other machines, one direction; none takes that of the maker's own machine."""
    mfu: float | None = Field(default=None, gt=0, le=1)
    """Model FLOPs utilisation of one GPU, 0 to 1; none takes published figures."""
    price: float | None = Field(default=None, gt=0)
    """$ of a GPU and hour."""
    curve: str | None = None
    """PNG to write: speed on 1 to 1,024 GPUs."""
    image_size: int | None = Field(default=None, ge=1)
    """Side of the images in pixels, where there is no data set yet."""
    channels: int = Field(default=3, ge=1)
    """Channels of the images, where there is no data set yet."""
    classes: int | None = Field(default=None, ge=0)
    """Classes of the images, where there is no data set yet; 0 for none."""


class PlanConfig(TrainConfig):
    """A recipe of ``train`` in; memory, speed, traffic and cost on GPUs out. It needs no GPU and no data set."""

    plan: GpusConfig


VERB = Verb(
    "verbs.plan",
    PlanConfig,
    "print what a recipe needs of GPUs, how fast it will be and what it costs",
    "tarflow-scale plan configs/train/imagenet64-conditional.yaml --gpus 8 --gpu h100",
    flags=flags_of(GpusConfig, "plan"),
)
