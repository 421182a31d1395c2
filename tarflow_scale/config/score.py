"""Scoring: a version and images in, a table of anomaly scores out."""

from typing import Literal

from pydantic import Field

from tarflow_scale.config.base import Root, Section
from tarflow_scale.config.cluster import ClusterConfig
from tarflow_scale.config.data import DataSetConfig
from tarflow_scale.config.verb import Verb
from tarflow_scale.config.versions import VersionConfig

__all__ = ["VERB", "ScoreConfig", "ScoringConfig"]


class ScoringConfig(Section):
    """How images are scored, and where the table goes (verb ``score``)."""

    path: str
    """Folder or URL for ``scores.csv`` (or ``.parquet``) and ``summary.json``; parts on their way are in it too."""
    format: Literal["csv", "parquet"] = "csv"
    """Of the table; ``parquet`` needs the extra ``parquet``."""
    false_alarm_rate: float = Field(default=0.05, gt=0, lt=1)
    """An image is flagged above the score that this share of the held-out normal images exceeds."""
    num_draws: int = Field(default=1, ge=1)
    """Dequantization draws per image; the log of their mean density counts."""
    seed: int = Field(default=0, ge=0)
    """Seed of the draws."""
    labels: Literal["dropped", "marginal"] = "dropped"
    """Anomalies have no label. ``dropped``: as classifier-free training drops it. ``marginal``: the density summed over
    all labels, as many passes."""
    batch_size: int = Field(default=128, ge=1)
    """Images scored together."""
    maps: int = Field(default=0, ge=0)
    """Of so many of the least likely images of ``data``, a picture ``maps.png`` shows which pixels surprise, labels
    dropped; of Glow and RealNVP, which squares of pixels."""


class ScoreConfig(Root):
    """A version and images in, a table of anomaly scores out."""

    registry: VersionConfig
    background: VersionConfig | None = None
    """A model of images in general, for the likelihood ratio; say one trained on noisier or broader data."""
    data: DataSetConfig
    """The images to score."""
    calibration: DataSetConfig
    """Held-out normal images, which say what is typical and where the threshold is; not those of training."""
    anomalies: DataSetConfig | None = None
    """A second set to score, known to be anomalous, with which ``data`` is compared as normal."""
    scoring: ScoringConfig
    cluster: ClusterConfig = ClusterConfig()


VERB = Verb(
    "verbs.score.driver",
    ScoreConfig,
    "score how anomalous images are, on Ray",
    "tarflow-scale score configs/score/digits.yaml scoring.labels=marginal",
)
