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
    """Folder or URL for ``scores.csv`` (or ``.parquet``), ``summary.json`` and temporary parts."""
    format: Literal["csv", "parquet"] = "csv"
    """Format of the table; ``parquet`` needs the extra ``parquet``."""
    false_alarm_rate: float = Field(default=0.05, gt=0, lt=1)
    """Share of the held-out normal images above the threshold; images with a higher score are flagged."""
    num_draws: int = Field(default=1, ge=1)
    """Dequantization draws per image; the score uses the log of their mean density."""
    seed: int = Field(default=0, ge=0)
    """Seed of the draws."""
    labels: Literal["dropped", "marginal"] = "dropped"
    """How labels are treated, which anomalies do not have. ``dropped``: as in training without the label. ``marginal``:
    the density is summed over all labels, with one pass for each."""
    batch_size: int = Field(default=128, ge=1)
    """Images scored together."""
    maps: int = Field(default=0, ge=0)
    """Number of the least likely images of ``data`` in the picture ``maps.png``, which marks the pixels that contribute
    most (of Glow and RealNVP, squares of pixels); labels are dropped."""


class ScoreConfig(Root):
    """Write a table of anomaly scores of images under a registered version."""

    registry: VersionConfig
    background: VersionConfig | None = None
    """A model of images in general, for the likelihood ratio; for example one trained on noisier or broader data."""
    data: DataSetConfig
    """The images to score."""
    calibration: DataSetConfig
    """Held-out normal images, not used in training; they determine the typical score and the threshold."""
    anomalies: DataSetConfig | None = None
    """Known anomalies, also scored; ``data`` is compared with them as the normal set."""
    scoring: ScoringConfig
    cluster: ClusterConfig = ClusterConfig()


VERB = Verb(
    "verbs.score.driver",
    ScoreConfig,
    "score how anomalous images are, on Ray",
    "tarflow-scale score configs/score/digits.yaml scoring.labels=marginal",
)
