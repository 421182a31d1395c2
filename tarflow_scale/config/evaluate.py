"""Configuration of the verb ``evaluate``."""

from pydantic import Field

from tarflow_scale.config.base import Root, Section
from tarflow_scale.config.cluster import ClusterConfig
from tarflow_scale.config.data import DataSetConfig
from tarflow_scale.config.sampling import SamplingConfig
from tarflow_scale.config.verb import Flag, Verb
from tarflow_scale.config.versions import VersionConfig

__all__ = ["VERB", "EvaluateConfig", "MetricsConfig", "ReferenceConfig"]


class MetricsConfig(Section):
    """The metrics to measure."""

    protocols: tuple[str, ...] = Field(min_length=1)
    """Protocol files, one for each metric; see ``evals/protocols/``."""
    extractor_weights: dict[str, str] = Field(default_factory=dict)
    """Paths of weights files by extractor name. Published weights may be left out if they are in the torch hub cache.
    The SHA-256 of each file is verified, and is part of the protocol id."""
    baselines: bool = True
    """Also measure two baselines by the same protocols: a full-covariance Gaussian fitted to the reference, and real
    images."""
    watch_seconds: float = Field(default=30.0, gt=0)
    """With ``--watch``: time between checks of the registry."""


class ReferenceConfig(Section):
    """The data set of real images with which generated images are compared."""

    path: str
    """Folder or URL that holds ``manifest.json``."""
    cache: str
    """Folder or URL for reference statistics and temporary results of evaluations; all workers must have access to it.
    """


class EvaluateConfig(Root):
    """Measure a registered version, and attach a report with all metrics and their protocols to it."""

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
            "instead, compute the reference statistics that the protocols need, and store them; needs no model",
            function="bind",
        ),
        Flag("watch", "evaluate every new version of the model, until interrupted", function="watch"),
    ),
)
