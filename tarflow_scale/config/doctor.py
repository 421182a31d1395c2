"""Configuration of the verb ``doctor``: sections of other verbs, and a few that only doctor reads."""

from typing import Any, Literal, get_args

from pydantic import Field, model_validator

from tarflow_scale.config.base import Root, Section
from tarflow_scale.config.cluster import ClusterConfig
from tarflow_scale.config.data import DataConfig, DataSetConfig
from tarflow_scale.config.evaluate import EvaluateConfig, MetricsConfig, ReferenceConfig
from tarflow_scale.config.generate import GenerateConfig, GeneratedShardsConfig
from tarflow_scale.config.models import BrowseConfig
from tarflow_scale.config.parallelism import ParallelismConfig
from tarflow_scale.config.prepare import PrepareConfig
from tarflow_scale.config.score import ScoreConfig, ScoringConfig
from tarflow_scale.config.train import (
    CheckpointConfig,
    LoggingConfig,
    TrainConfig,
    TrainedConfig,
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
"""All checks, in the order in which they run."""


class ChecksConfig(Section):
    """Selection of checks, and their time limit."""

    only: tuple[CheckName, ...] = CHECKS
    """The checks to run."""
    timeout_seconds: float = Field(default=60.0, gt=0)
    """Time limit of a check; a check that takes longer is stopped and fails."""


class RanksConfig(Section):
    """Settings for the check of collective operations. If a launcher started ranks, the check uses these ranks."""

    num_ranks: int = Field(default=2, ge=0)
    """Without a launcher: number of gloo ranks to start on this machine; 0 skips the check."""
    timeout_seconds: float = Field(default=30.0, gt=0)
    """Time limit for all ranks to connect; the all-reduce that follows has the same limit."""


class StoreConfig(Section):
    """A folder or store that a job will read and write."""

    path: str
    """Folder or URL of the store."""


class FindingsConfig(Section):
    """A file for the findings, which are also printed."""

    path: str
    """Local path or URL of a JSON file."""


class CheckedMetricsConfig(MetricsConfig):
    """Protocols and extractor weights to check; one of the two is enough."""

    protocols: tuple[str, ...] = ()
    """Protocol files; they name extractors and the required SHA-256 of their weights."""


class WrittenShardsConfig(GeneratedShardsConfig):
    """Where ``prepare`` or ``generate`` writes."""

    num_workers: int = Field(default=1, ge=1)
    """A key of ``prepare``; it is not checked."""


class DoctorConfig(Root):
    """No key is required. Without a configuration, doctor checks this machine in general.

    Pass the configuration of ``prepare``, ``train``, ``evaluate``, ``generate`` or ``score`` to check the requirements
    of that job. Sections that do not depend on the machine, such as ``optimizer``, are ignored.
    """

    checks: ChecksConfig = ChecksConfig()
    ranks: RanksConfig = RanksConfig()
    store: StoreConfig | None = None
    output: FindingsConfig | None = None
    registry: BrowseConfig | None = None
    data: DataConfig | None = None
    reference: ReferenceConfig | None = None
    calibration: DataSetConfig | None = None
    """Held-out normal images of ``score``."""
    anomalies: DataSetConfig | None = None
    """Known anomalies of ``score``."""
    validation: ValidationConfig | None = None
    shards: WrittenShardsConfig | None = None
    scoring: ScoringConfig | None = None
    metrics: CheckedMetricsConfig | None = None
    cluster: ClusterConfig | None = None
    model: TrainedConfig | None = None
    """Section of ``train``; see its manual for the keys."""
    training: TrainingConfig | None = None
    parallelism: ParallelismConfig = ParallelismConfig()
    checkpoint: CheckpointConfig | None = None
    logging: LoggingConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_a_job(cls, raw: Any) -> Any:
        jobs = (PrepareConfig, TrainConfig, EvaluateConfig, GenerateConfig, ScoreConfig)
        foreign = {"report", "gate", "weights", "command"} & set(raw)
        if "autoencoder" in raw and "model" not in raw:  # of convert; train has both
            foreign.add("autoencoder")
        if foreign:
            raise ValueError(
                f"doctor takes configurations of prepare, train, evaluate, generate and score (got section "
                f"{min(foreign)} of another verb); pass one of these files, or no file to check only this machine"
            )
        ignored = {name for job in jobs for name in job.model_fields} - set(cls.model_fields)
        return {name: section for name, section in raw.items() if name not in ignored}

    @property
    def data_sets(self) -> dict[str, str]:
        """Paths of the data sets that the job reads, by key."""
        sections = ("data", "validation", "reference", "calibration", "anomalies")
        paths = {f"{name}.path": getattr(self, name).path for name in sections if getattr(self, name) is not None}
        return paths | {f"data.mix.{i}.path": data.path for i, data in enumerate(self.data.mix if self.data else ())}

    @property
    def writes_registry(self) -> bool | None:
        """Whether the job writes to its registry; None if the configuration has a registry but describes no job."""
        if self.training is not None or self.metrics is not None:
            return True
        return False if self.shards is not None or self.scoring is not None else None

    @property
    def written(self) -> dict[str, str]:
        """Folders and URLs that the job writes to, by key, except the run folder."""
        paths = {
            f"{name}.path": getattr(self, name).path
            for name in ("store", "registry", "shards", "scoring")
            if getattr(self, name) is not None and (name != "registry" or self.writes_registry is not False)
        }
        if self.reference is not None:
            paths["reference.cache"] = self.reference.cache
        if self.checkpoint is not None and self.checkpoint.upload_path is not None:
            paths["checkpoint.upload_path"] = self.checkpoint.upload_path
        return paths


VERB = Verb(
    "verbs.doctor.driver",
    DoctorConfig,
    "check whether this machine and its cluster can do the work; exit code 1 if not",
    "tarflow-scale doctor configs/train/digits.yaml store.path=s3://bucket/folder cluster.address=10.0.0.1:6379",
)
