"""Configuration of the verb ``score``."""

from typing import Literal

from pydantic import Field

from tarflow_scale.config.base import Root, Section
from tarflow_scale.config.cluster import ClusterConfig
from tarflow_scale.config.data import DataSetConfig
from tarflow_scale.config.verb import Verb
from tarflow_scale.config.versions import VersionConfig

__all__ = ["VERB", "ScoreConfig", "ScoringConfig"]


class ScoringConfig(Section):
    """How images are scored, and where the table is written."""

    path: str
    """Folder or URL for ``scores.csv`` (or ``.parquet``), ``summary.json`` and temporary results."""
    format: Literal["csv", "parquet"] = "csv"
    """Format of the table; ``parquet`` needs the extra ``parquet``."""
    false_alarm_rate: float = Field(default=0.05, gt=0, lt=1)
    """Determines the threshold: at most this share of the held-out normal images has a higher score. Images with
    scores above the threshold are flagged."""
    num_draws: int = Field(default=1, ge=1)
    """Number of dequantization draws per image; the score uses the log of their mean density."""
    seed: int = Field(default=0, ge=0)
    """Seed of the draws."""
    labels: Literal["dropped", "marginal"] = "dropped"
    """Density that the score uses. It never uses the label of an image, because anomalies have none. ``dropped``: the
    density without a label. ``marginal``: the mean density over all labels, which needs one pass per label."""
    batch_size: int = Field(default=128, ge=1)
    """Number of images that are scored together."""
    maps: int = Field(default=0, ge=0)
    """Number of images in the picture ``maps.png``. It shows the least likely images of ``data``, and marks the pixels
    (for Glow and RealNVP, squares of pixels) that contribute most. Labels are dropped."""


class ScoreConfig(Root):
    """Write a table with an anomaly score for each image, computed by a registered version."""

    registry: VersionConfig
    background: VersionConfig | None = None
    """A second model, for the likelihood ratio. It models images in general: it is trained on noisier or broader data.
    """
    data: DataSetConfig
    """The images to score."""
    calibration: DataSetConfig
    """Held-out normal images, not used in training; they determine the typical score and the threshold."""
    anomalies: DataSetConfig | None = None
    """Known anomalies. They are also scored, and compared with the images of ``data``, which are taken as normal."""
    scoring: ScoringConfig
    cluster: ClusterConfig = ClusterConfig()


VERB = Verb(
    "verbs.score.driver",
    ScoreConfig,
    "score how anomalous images are, on Ray",
    "tarflow-scale score configs/score/digits.yaml scoring.labels=marginal",
)
