"""Every section of every configuration, in the order in which a batch meets them.

A verb's root (`tarflow_scale.config.roots`) is composed of these. Functions get their section, never a root.
Defaults live here and nowhere else; the text under a field is its documentation, printed by ``--help``.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tarflow_scale.config.base import Section

__all__ = [
    "BrowseConfig",
    "CheckpointConfig",
    "ClusterConfig",
    "FlowOutputConfig",
    "ForeignWeightsConfig",
    "GateRef",
    "Guidance",
    "LoggingConfig",
    "MetricsConfig",
    "NoiseConfig",
    "OptimizerConfig",
    "ParallelismConfig",
    "ReferenceConfig",
    "RegistryConfig",
    "SamplingConfig",
    "ScheduleConfig",
    "TrainingConfig",
    "VersionConfig",
]

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
"""A name that is also a safe file name."""


class OptimizerConfig(Section):
    """AdamW."""

    peak_lr: float = Field(default=1e-4, gt=0)
    """Highest learning rate."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """Decay of the first and second moment."""
    weight_decay: float = Field(default=1e-4, ge=0)
    """Decoupled weight decay on every parameter, as published for TarFlow."""
    gradient_clip_norm: float = Field(default=1.0, gt=0)
    """Gradients of larger global norm are scaled down to it."""


class ScheduleConfig(Section):
    """Learning rate as a pure function of images seen: linear warm-up, then cosine."""

    warmup_images: int = Field(default=0, ge=0)
    """Images over which the rate rises from 0 to its peak."""
    final_lr_fraction: float = Field(default=0.01, ge=0, le=1)
    """Rate at the end, as a fraction of the peak."""


class NoiseConfig(Section):
    """What is added to quantised pixels before the flow sees them."""

    kind: Literal["uniform", "gaussian"] = "uniform"
    """``uniform``: dequantisation inside the bin, for an exact likelihood and bits/dim.
    ``gaussian``: noise of ``std``, for sample quality; such a model has no bits/dim."""
    std: float = Field(default=0.0, ge=0)
    """Standard deviation on [-1, 1]; needed by ``gaussian``."""

    @model_validator(mode="after")
    def _std_fits_kind(self) -> "NoiseConfig":
        if (self.kind == "gaussian") != (self.std > 0):
            raise ValueError(f"std must be > 0 for gaussian and 0 for uniform noise (got {self.kind} and {self.std})")
        return self


class TrainingConfig(Section):
    """How long, how large, from which seed."""

    total_images: int = Field(ge=1)
    """Images seen by the end of the run; the unit of all progress."""
    global_batch_size: int = Field(ge=1)
    """Images per optimizer step over all ranks; part of the order of samples."""
    micro_batch_size: int = Field(ge=1)
    """Images per rank in one forward pass; gradients accumulate over the rest."""
    seed: int = Field(default=0, ge=0, lt=2**64)
    """Seed of weights, order of samples, noise and label dropping."""
    noise: NoiseConfig = NoiseConfig()
    label_drop: float = Field(default=0.1, ge=0, le=1)
    """Probability that a sample's label is dropped, so that guidance has an unconditional model to lean on."""
    ema_half_life_images: int = Field(default=50_000, ge=1)
    """Half-life, in images, of the exponential moving average of the weights; sampling uses the average."""
    max_skipped_steps: int = Field(default=10, ge=0)
    """A step whose loss or gradient is not finite is skipped; more than this many in a row stop the run."""
    threads: int = Field(default=0, ge=0)
    """Torch threads per rank; 0 shares the cores among the ranks of the machine."""


class ParallelismConfig(Section):
    """DeepSpeed ZeRO. Stage 1 divides the optimizer's state among ranks, 2 also the gradients, 3 also the weights.

    Bytes per parameter on N ranks, for weights, gradients, fp32 masters, two moments and one moving average:
    stage 0: 16 + 4/N; stage 1: 8 + 16/N; stage 2: 4 + 20/N; stage 3: 24/N. (Stage 0 has no separate master.)
    """

    zero_stage: Literal[0, 1, 2, 3] = 2
    precision: Literal["fp32", "bf16"] = "fp32"
    """``bf16``: matrix products in bfloat16 through autocast; parameters, affine maps and sums stay fp32."""
    activations: Literal["keep", "checkpoint", "rebuild"] = "keep"
    """Memory for time. ``checkpoint``: keep the inputs of layers and run each again in the backward pass.
    ``rebuild`` (Glow): invert layer after layer, so that memory does not grow with depth."""


class CheckpointConfig(Section):
    """When the run is saved so that it can be resumed."""

    every_images: int = Field(ge=1)
    """Images between checkpoints; rounded up to whole steps."""
    keep_last: int = Field(default=2, ge=1)
    """Older complete checkpoints are deleted."""


class LoggingConfig(Section):
    """The run folder and what is written to it."""

    path: str
    """Folder of the run: ``config.yaml log.jsonl checkpoints/ previews/ model/``."""
    every_images: int = Field(default=2_000, ge=1)
    """Images between lines of ``log.jsonl``."""
    preview_every_images: int = Field(default=50_000, ge=1)
    """Images between sample grids."""
    preview_guidance: float = Field(default=0.0, ge=0)
    """Guidance of the sample grids."""


class RegistryConfig(Section):
    """A registry and one model in it."""

    path: str
    """Folder or URL of the registry."""
    model: Name
    """Name of the model."""


class VersionConfig(RegistryConfig):
    """One version of a model."""

    version: int | str = "latest"
    """A number, an alias such as ``champion``, or ``latest``."""


class BrowseConfig(Section):
    """A registry to look at (verb ``models``)."""

    path: str
    """Folder or URL of the registry."""
    model: Name | None = None
    """Name of a model; ``list`` shows all models without it, the other commands need it."""
    version: int | str = "latest"
    """A number, an alias such as ``champion``, or ``latest``; for ``rollback`` the alias."""


class Guidance(Section):
    """Guidance of sampling: predictions a become a + scale (a - a_weak), where the weak prediction drops the label.

    It acts on log-scale and mean alike (arXiv 2412.06329, section 3.4).
    """

    scale: float = Field(default=0.0, ge=0)
    """Strength; 0 samples the model's own distribution."""
    annealed: bool = False
    """TarFlow: the strength rises linearly over the T tokens of a block, from scale / (T - 1) to scale."""
    attention_temperature: float = Field(default=1.0, gt=0)
    """TarFlow: attention logits of the weak prediction are divided by it. It is what guides a model without classes,
    whose two predictions are equal at 1."""
    what: Literal["both", "log_scale", "mean"] = "both"
    """Which of the two parameters is guided."""

    @model_validator(mode="after")
    def _has_an_effect(self) -> "Guidance":
        if self.scale == 0 and (self.annealed or self.attention_temperature != 1 or self.what != "both"):
            raise ValueError("annealed, attention_temperature and what have no effect at scale=0; set a scale")
        return self


class SamplingConfig(Section):
    """How the flow is sampled. Image i depends on (weights, seed, i) and these settings, not on the batch."""

    batch_size: int = Field(default=128, ge=1)
    """Images decoded together."""
    guidance: Guidance = Guidance()
    temperature: float = Field(default=1.0, ge=0)
    """Standard deviation of the latent."""
    denoise: float = Field(default=0.0, ge=0)
    """Strength of one Tweedie step, for models trained with Gaussian noise: 1 removes the noise in the mean, 0 is
    off."""


class SeededSamplingConfig(SamplingConfig):
    """Sampling of the verb ``generate``."""

    seed: int = Field(default=0, ge=0, lt=2**64)
    """Seed of the latents."""
    num_images: int = Field(ge=1)
    """Images to generate; labels run through the classes in turn."""


class MetricsConfig(Section):
    """What is measured."""

    protocols: tuple[str, ...] = Field(min_length=1)
    """Protocol files, one for each number; see ``evals/protocols/``."""
    extractor_weights: str | None = None
    """Weights file of the extractor; None looks in the torch hub cache. Its sha256 is checked."""
    baselines: bool = True
    """Also measure a full-covariance Gaussian fitted to the reference, and real images, by the same protocols."""


class ReferenceConfig(Section):
    """The real images that distances are measured to."""

    path: str
    """The data set: folder or URL that holds ``manifest.json``."""
    cache: str
    """Folder or URL where reference statistics are kept, by the digests of protocol, extractor and images."""


class ClusterConfig(Section):
    """Where units of work run."""

    executor: Literal["ray", "local"] = "ray"
    """``ray``: actors. ``local``: this process; the results are identical."""
    address: str | None = None
    """Address of a running Ray cluster; None starts one on this machine, on loopback."""
    num_workers: int = Field(default=2, ge=1)
    """Actors, each with one copy of the model."""
    cpus_per_worker: int = Field(default=1, ge=1)
    """CPU cores, and torch threads, of a worker."""
    gpus_per_worker: int = Field(default=0, ge=0)
    """GPUs of a worker."""


class ForeignWeightsConfig(Section):
    """Weights that another project saved (verb ``convert``)."""

    path: str
    """The ``.pth`` that apple/ml-tarflow's train.py saved; path or URL."""
    num_channels: int | None = Field(default=None, ge=1)
    """Channels of the images; None infers 1 or 3 from the size of a token."""
    noise: NoiseConfig
    """Noise of the training, which is not in the file but in its name: ``..._0.05.pth`` is
    ``{kind: gaussian, std: 0.05}``, ``..._uniform.pth`` is ``{kind: uniform}``."""


class FlowOutputConfig(Section):
    """Where a flow is written."""

    path: str
    """Folder or URL for ``model.safetensors`` and ``config.json``."""


class GateRef(Section):
    """Which gate guards which alias."""

    path: str
    """Gate file; see ``evals/gates/``."""
    alias: Name = "champion"
    """The alias that moves when the gate opens."""
    reason: str = ""
    """Why, in the words of whoever promotes; stored."""

    @model_validator(mode="after")
    def _alias_is_no_number(self) -> "GateRef":
        if self.alias == "latest" or self.alias.isdigit():
            raise ValueError(f"alias must be a name other than latest (got {self.alias}); for example champion")
        return self
