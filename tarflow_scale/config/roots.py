"""One root section a verb."""

from typing import Self

from pydantic import model_validator

from tarflow_scale.config.base import Root
from tarflow_scale.config.data import (
    LAYOUT_KINDS,
    DataConfig,
    DataSetConfig,
    GeneratedShardsConfig,
    PackedShardsConfig,
    SourceConfig,
    SplitConfig,
)
from tarflow_scale.config.flows import ModelConfig, RealNVPConfig
from tarflow_scale.config.leaderboards import ReportOutputConfig
from tarflow_scale.config.sections import (
    BrowseConfig,
    ClusterConfig,
    CommandConfig,
    FlowOutputConfig,
    ForeignWeightsConfig,
    GateRef,
    MetricsConfig,
    ReferenceConfig,
    RegistryConfig,
    SamplingConfig,
    ScoringConfig,
    SeededSamplingConfig,
    VersionConfig,
)
from tarflow_scale.config.training import (
    CheckpointConfig,
    LoggingConfig,
    OptimizerConfig,
    ParallelismConfig,
    ScheduleConfig,
    TrainingConfig,
    ValidationConfig,
)

__all__ = [
    "ConvertConfig",
    "EvaluateConfig",
    "GenerateConfig",
    "ModelsConfig",
    "PrepareConfig",
    "PromoteConfig",
    "ReportConfig",
    "ScoreConfig",
    "TrainConfig",
]


class PrepareConfig(Root):
    """Images in, WebDataset shards out: ``<shards.path>/train`` and ``<shards.path>/test``."""

    source: SourceConfig
    split: SplitConfig = SplitConfig()
    shards: PackedShardsConfig

    @model_validator(mode="after")
    def _in_place_stays(self) -> Self:
        if self.source.in_place and self.shards.path != self.source.path:
            raise ValueError(
                f"shards.path must be source.path where source.in_place is set (got {self.shards.path} and "
                f"{self.source.path}); tars that are indexed in place do not move"
            )
        if self.source.in_place and self.split != SplitConfig():
            raise ValueError("split has no effect where source.in_place is set; remove it")
        if self.source.kind not in LAYOUT_KINDS and any(self.split.patterns.values()):
            raise ValueError(
                f"patterns of split need source.kind={', '.join(LAYOUT_KINDS)} (got {self.source.kind}); remove them"
            )
        return self


class TrainConfig(Root):
    """Shards in, checkpoints, a log, sample grids and a registered model version out."""

    data: DataConfig
    model: ModelConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    training: TrainingConfig
    parallelism: ParallelismConfig = ParallelismConfig()
    checkpoint: CheckpointConfig
    validation: ValidationConfig | None = None
    logging: LoggingConfig
    registry: RegistryConfig

    @model_validator(mode="after")
    def _counts_divide(self) -> Self:
        batch, micro = self.training.global_batch_size, self.training.micro_batch_size
        if batch % micro:
            raise ValueError(
                f"training.global_batch_size must be a multiple of training.micro_batch_size "
                f"(got {batch} and {micro}); use {micro * max(1, batch // micro)}"
            )
        if self.logging.preview_guidance > 0 and not self.model.class_conditional:
            raise ValueError(
                f"logging.preview_guidance needs model.class_conditional (got {self.logging.preview_guidance} and "
                f"false); set it to 0"
            )
        if self.model.logit_alpha is not None and self.training.noise.kind != "uniform":
            raise ValueError(
                f"model.logit_alpha needs training.noise.kind=uniform, which stays inside [-1, 1] (got "
                f"{self.training.noise.kind}); remove either"
            )
        if self.model.dequantization is not None and self.training.noise.kind != "uniform":
            raise ValueError(
                f"model.dequantization needs training.noise.kind=uniform, which stays in the bins of pixels (got "
                f"{self.training.noise.kind}); remove either"
            )
        return self

    @model_validator(mode="after")
    def _model_allows(self) -> Self:
        kind, parallelism = self.model.kind, self.parallelism
        if parallelism.activations == "rebuild" and kind != "glow":
            raise ValueError(
                f"parallelism.activations=rebuild needs a flow whose layers invert in one pass (got model.kind="
                f"{kind}); use checkpoint"
            )
        batch = isinstance(self.model, RealNVPConfig) and self.model.normalization == "batch"
        if (batch or kind == "continuous") and parallelism.activations != "keep":
            raise ValueError(
                f"parallelism.activations={parallelism.activations} is not for a continuous flow, whose adjoint keeps "
                f"nothing, nor for model.normalization=batch (got model.kind={kind}); use keep"
            )
        if kind == "continuous" and parallelism.zero_stage == 3:
            raise ValueError(
                "parallelism.zero_stage=3 divides weights that a solver needs whole (got model.kind=continuous); use 2"
            )
        if kind in ("maf", "iaf", "continuous") and (parallelism.compile or self.optimizer.kind == "muon"):
            raise ValueError(
                f"parallelism.compile and optimizer.kind=muon are not for model.kind={kind} (got either); leave them "
                f"out"
            )
        if kind not in ("tarflow", "glow", "realnvp") and self.logging.preview_guidance > 0:
            raise ValueError(
                f"logging.preview_guidance has no effect on model.kind={kind} (got {self.logging.preview_guidance}); "
                f"set it to 0"
            )
        return self

    @model_validator(mode="after")
    def _optimizer_fits(self) -> Self:
        warmup, decay, total = self.schedule.warmup_images, self.schedule.decay_images, self.training.total_images
        if warmup + (decay or 0) >= total:
            names, got = "schedule.warmup_images", str(warmup)
            if decay:
                names, got = f"{names} + schedule.decay_images", f"{warmup} + {decay} = {warmup + decay}"
            raise ValueError(
                f"{names} must be below training.total_images (got {got}, and {total}); lower the former or raise the "
                f"latter"
            )
        if self.optimizer.kind == "muon" and self.parallelism.zero_stage not in (1, 2):
            raise ValueError(
                f"optimizer.kind=muon needs parallelism.zero_stage 1 or 2 (got {self.parallelism.zero_stage}); change "
                f"either"
            )
        if self.optimizer.kind == "muon" and self.parallelism.offload != "none":
            raise ValueError(
                f"optimizer.kind=muon needs parallelism.offload=none (got {self.parallelism.offload}); change either"
            )
        return self


class EvaluateConfig(Root):
    """A registered version in, numbers with their protocol out, attached to the version."""

    registry: VersionConfig
    data: DataSetConfig
    sampling: SamplingConfig = SamplingConfig()
    metrics: MetricsConfig
    reference: ReferenceConfig
    cluster: ClusterConfig = ClusterConfig()


class PromoteConfig(Root):
    """A version with its report in, a decision out; the alias moves if the gate opens."""

    registry: VersionConfig
    gate: GateRef


class GenerateConfig(Root):
    """A version in, shards of generated images out; runs again only what is missing."""

    registry: VersionConfig
    sampling: SeededSamplingConfig
    shards: GeneratedShardsConfig
    cluster: ClusterConfig = ClusterConfig()


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


class ReportConfig(Root):
    """Registries in, leaderboards out: Markdown, and one HTML page that needs no network."""

    report: ReportOutputConfig


class ConvertConfig(Root):
    """Weights of apple/ml-tarflow in, a saved flow out, and a registered version where a registry is named."""

    weights: ForeignWeightsConfig
    output: FlowOutputConfig
    registry: RegistryConfig | None = None
    data: DataSetConfig | None = None

    @model_validator(mode="after")
    def _registers_with_data(self) -> Self:
        if (self.registry is None) != (self.data is None):
            given, missing = ("registry", "data") if self.data is None else ("data", "registry")
            raise ValueError(
                f"registry and data.path go together (got {given} without {missing}); a version names the data set it "
                f"was trained on"
            )
        return self


class ModelsConfig(Root):
    """A registry, and what a command needs; none reads weights into memory as a model."""

    registry: BrowseConfig
    command: CommandConfig = CommandConfig()
