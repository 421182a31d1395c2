"""Evaluation: a version in, numbers with their protocol out."""

from pydantic import Field

from tarflow_scale.config.base import Root, Section
from tarflow_scale.config.cluster import ClusterConfig
from tarflow_scale.config.data import DataSetConfig
from tarflow_scale.config.sampling import SamplingConfig
from tarflow_scale.config.verb import Flag, Verb
from tarflow_scale.config.versions import VersionConfig

__all__ = ["VERB", "EvaluateConfig", "MetricsConfig", "ReferenceConfig"]


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


VERB = Verb(
    "verbs.evaluate.driver",
    EvaluateConfig,
    "measure a registered version by protocols, on Ray",
    "tarflow-scale evaluate configs/evaluate/digits.yaml registry.version=3 cluster.num_workers=4",
    flags=(
        Flag(
            "reference",
            "compute what the protocols are compared with, and bind them to it, instead; needs no model",
            function="bind",
        ),
        Flag("watch", "score every version of the model as it is registered, until interrupted", function="watch"),
    ),
)
