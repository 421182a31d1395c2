"""Evaluation: a version in, numbers with their protocol out."""

from pydantic import Field

from tarflow_scale.config.base import Root, Section
from tarflow_scale.config.cluster import ClusterConfig
from tarflow_scale.config.data import DataSetConfig
from tarflow_scale.config.registry import VersionConfig
from tarflow_scale.config.sampling import SamplingConfig

__all__ = ["EvaluateConfig", "MetricsConfig", "ReferenceConfig"]


class MetricsConfig(Section):
    """What is measured."""

    protocols: tuple[str, ...] = Field(min_length=1)
    """Protocol files, one for each number; see ``evals/protocols/``."""
    extractor_weights: dict[str, str] = Field(default_factory=dict)
    """Weights files by name of the extractor; Inception's is also looked for in the torch hub cache. The sha256 of each
    is checked, and is part of the protocol id."""
    baselines: bool = True
    """Also measure a full-covariance Gaussian fitted to the reference, and real images, by the same protocols."""
    watch_seconds: float = Field(default=30.0, gt=0)
    """Between looks at the registry with ``--watch``."""


class ReferenceConfig(Section):
    """The real images that distances are measured to."""

    path: str
    """The data set: folder or URL that holds ``manifest.json``."""
    cache: str
    """Folder or URL that all workers see, where reference statistics are kept, and parts of evaluations on their
    way."""


class EvaluateConfig(Root):
    """A registered version in, numbers with their protocol out, attached to the version."""

    registry: VersionConfig
    data: DataSetConfig
    sampling: SamplingConfig = SamplingConfig()
    metrics: MetricsConfig
    reference: ReferenceConfig
    cluster: ClusterConfig = ClusterConfig()
