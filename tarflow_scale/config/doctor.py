"""What the verb ``doctor`` is told of the work: sections of other verbs, by their names, and a few of its own."""

from typing import Any, Literal, get_args

from pydantic import Field, model_validator

from tarflow_scale.config.base import Root, Section
from tarflow_scale.config.cluster import ClusterConfig
from tarflow_scale.config.data import DataConfig, DataSetConfig
from tarflow_scale.config.evaluate import EvaluateConfig, MetricsConfig, ReferenceConfig
from tarflow_scale.config.generate import GenerateConfig, GeneratedShardsConfig
from tarflow_scale.config.model import ModelConfig
from tarflow_scale.config.models import BrowseConfig
from tarflow_scale.config.prepare import PrepareConfig
from tarflow_scale.config.score import ScoreConfig, ScoringConfig
from tarflow_scale.config.train import (
    CheckpointConfig,
    LoggingConfig,
    ParallelismConfig,
    TrainConfig,
    TrainingConfig,
    ValidationConfig,
)
from tarflow_scale.config.verb import Verb

__all__ = ["CHECKS", "VERB", "ChecksConfig", "DoctorConfig"]

CheckName = Literal[
    "launch", "ranks", "packages", "torch", "compiler", "threads", "memory", "limits", "home", "temporary", "disk",
    "data", "store", "weights", "cluster",
]  # fmt: skip
CHECKS: tuple[CheckName, ...] = get_args(CheckName)
"""Every check, in the order in which they are made."""


class ChecksConfig(Section):
    """Which checks are made, and how long each may take."""

    only: tuple[CheckName, ...] = CHECKS
    """The checks to make."""
    timeout_seconds: float = Field(default=60.0, gt=0)
    """A check that takes longer is cut off, and has failed."""


class RanksConfig(Section):
    """The check of collectives. Under a launcher all its ranks take part, and these are not started."""

    num_ranks: int = Field(default=2, ge=0)
    """Gloo ranks to start on this machine where no launcher did; 0 starts none."""
    timeout_seconds: float = Field(default=30.0, gt=0)
    """How long a rank waits for the others, once for them to come and once for them to sum."""


class StoreConfig(Section):
    """A place that jobs write to and read from."""

    path: str
    """Folder or URL."""


class FindingsConfig(Section):
    """Where the findings are written as well."""

    path: str
    """File or URL, JSON."""


class CheckedMetricsConfig(MetricsConfig):
    """What is measured, and the weights that it needs; weights alone will do."""

    protocols: tuple[str, ...] = ()
    """Protocol files, which name extractors and the sha256 that their weights must have."""


class WrittenShardsConfig(GeneratedShardsConfig):
    """Where ``prepare`` or ``generate`` writes."""

    num_workers: int = Field(default=1, ge=1)
    """Of ``prepare``; not looked at."""


class DoctorConfig(Root):
    """Nothing is required. Without arguments it looks at this machine; each section adds what such a job needs.

    A file of ``prepare``, ``train``, ``evaluate``, ``generate`` or ``score`` will do as it is; its sections that ask
    nothing of a machine, such as ``optimizer``, are passed over.
    """

    checks: ChecksConfig = ChecksConfig()
    ranks: RanksConfig = RanksConfig()
    store: StoreConfig | None = None
    output: FindingsConfig | None = None
    registry: BrowseConfig | None = None
    data: DataConfig | None = None
    reference: ReferenceConfig | None = None
    calibration: DataSetConfig | None = None
    """Of ``score``: held-out normal images."""
    anomalies: DataSetConfig | None = None
    """Of ``score``: images that are known to be anomalous."""
    validation: ValidationConfig | None = None
    shards: WrittenShardsConfig | None = None
    scoring: ScoringConfig | None = None
    metrics: CheckedMetricsConfig | None = None
    cluster: ClusterConfig | None = None
    model: ModelConfig | None = None
    """Of ``train``, whose manual has its keys."""
    training: TrainingConfig | None = None
    parallelism: ParallelismConfig = ParallelismConfig()
    checkpoint: CheckpointConfig | None = None
    logging: LoggingConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_a_job(cls, raw: Any) -> Any:
        jobs = (PrepareConfig, TrainConfig, EvaluateConfig, GenerateConfig, ScoreConfig)
        if foreign := {"report", "gate", "weights", "command"} & set(raw):
            raise ValueError(
                f"doctor takes files of prepare, train, evaluate, generate and score (got section {min(foreign)}, "
                f"which is of another verb); give one of these, or none for this machine alone"
            )
        passed_over = {name for job in jobs for name in job.model_fields} - set(cls.model_fields)
        return {name: section for name, section in raw.items() if name not in passed_over}

    @property
    def data_sets(self) -> dict[str, str]:
        """Data sets that are read: path by key."""
        sections = ("data", "validation", "reference", "calibration", "anomalies")
        found = {f"{name}.path": getattr(self, name).path for name in sections if getattr(self, name) is not None}
        return found | {f"data.mix.{i}.path": one.path for i, one in enumerate(self.data.mix if self.data else ())}

    @property
    def writes_registry(self) -> bool | None:
        """Whether the job writes to its registry: None where nothing but a registry is described."""
        if self.training is not None or self.metrics is not None:
            return True
        return False if self.shards is not None or self.scoring is not None else None

    @property
    def written(self) -> dict[str, str]:
        """Folders and URLs that jobs write to, but for the run folder: path by key."""
        found = {
            f"{name}.path": getattr(self, name).path
            for name in ("store", "registry", "shards", "scoring")
            if getattr(self, name) is not None and (name != "registry" or self.writes_registry is not False)
        }
        if self.reference is not None:
            found["reference.cache"] = self.reference.cache
        if self.checkpoint is not None and self.checkpoint.upload_path is not None:
            found["checkpoint.upload_path"] = self.checkpoint.upload_path
        return found


VERB = Verb(
    "verbs.doctor.driver",
    DoctorConfig,
    "see whether this machine, and its cluster, can do the work; exit code 1 says that it cannot",
    "tarflow-scale doctor configs/train/digits.yaml store.path=s3://bucket/folder cluster.address=10.0.0.1:6379",
)
