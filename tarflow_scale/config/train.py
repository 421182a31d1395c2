"""Configuration of the verb ``train``: optimizer, schedule, length, parallelism, checkpoints, validation, log.

Progress is counted in images, so that it does not depend on the batch size and the number of ranks.
"""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from tarflow_scale.config.base import Root, Section
from tarflow_scale.config.data import DataConfig, DataSetConfig
from tarflow_scale.config.model import Activations, ModelConfig
from tarflow_scale.config.verb import Verb
from tarflow_scale.config.versions import RegistryConfig, VersionConfig

__all__ = [
    "VERB",
    "CheckpointConfig",
    "LoggingConfig",
    "NoiseConfig",
    "OptimizerConfig",
    "ParallelismConfig",
    "Recipe",
    "ScheduleConfig",
    "SpikeConfig",
    "TrainConfig",
    "TrainingConfig",
    "ValidationConfig",
    "ZeroPlusPlusConfig",
]


class OptimizerConfig(Section):
    """The optimizer: AdamW, or Muon for matrices with AdamW for the other parameters."""

    kind: Literal["adamw", "muon"] = "adamw"
    """``muon``: DeepSpeed's Muon updates the matrices inside the flow by orthogonalized momentum; AdamW updates all
    other parameters, including the first and the last layer of every block. Muon needs ZeRO stage 1 or 2."""
    peak_lr: float = Field(default=1e-4, gt=0)
    """Highest learning rate of AdamW."""
    muon_peak_lr: float | None = Field(default=None, gt=0)
    """Highest learning rate of Muon, on the same schedule; usually 10 to 100 times ``peak_lr``."""
    muon_momentum: float = Field(default=0.95, ge=0, lt=1)
    """Decay of Muon's momentum."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """Decay of the first and the second moment of AdamW."""
    weight_decay: float = Field(default=1e-4, ge=0)
    """Decoupled weight decay of all parameters, as published for TarFlow."""
    gradient_clip_norm: float = Field(default=1.0, gt=0)
    """Maximum global norm of the gradients; a larger gradient is scaled down to this norm. No effect on Muon."""

    @model_validator(mode="after")
    def _muon_has_a_rate(self) -> "OptimizerConfig":
        if (self.kind == "muon") != (self.muon_peak_lr is not None):
            raise ValueError(
                f"muon_peak_lr and kind=muon must be set together (got kind={self.kind} and {self.muon_peak_lr}); set "
                f"both or neither"
            )
        if (
            self.kind == "muon"
            and self.gradient_clip_norm != OptimizerConfig.model_fields["gradient_clip_norm"].default
        ):
            raise ValueError(
                f"gradient_clip_norm has no effect on kind=muon (got {self.gradient_clip_norm}); remove it"
            )
        return self


class ScheduleConfig(Section):
    """Learning rate as a function of images seen: linear warm-up, then one of three shapes."""

    kind: Literal["cosine", "constant", "wsd"] = "cosine"
    """Shape after the warm-up. ``cosine``: fall to ``final_lr_fraction`` at the end of training. ``constant``: stay at
    the peak. ``wsd`` (warm-up, stable, decay): stay at the peak, then fall linearly to ``final_lr_fraction`` over the
    last ``decay_images``.

    A finished run continues if ``training.total_images`` is raised. With ``cosine``, the rate then jumps up to the
    longer schedule, which makes the model worse at first. Use ``wsd`` for runs that may be extended: keep a checkpoint
    from before the decay (``checkpoint.keep_every_images``) and delete the later checkpoints. The run then continues
    at the peak, and reaches the same weights as a run that had this length from the start."""
    warmup_images: int = Field(default=0, ge=0)
    """Number of images over which the rate rises from 0 to its peak."""
    decay_images: int | None = Field(default=None, ge=1)
    """``wsd``: number of images over which the rate falls."""
    final_lr_fraction: float = Field(default=0.01, ge=0, le=1)
    """Rate at the end, as a fraction of the peak; no effect on ``constant``."""

    @model_validator(mode="after")
    def _decay_fits_kind(self) -> "ScheduleConfig":
        if (self.kind == "wsd") != (self.decay_images is not None):
            raise ValueError(
                f"decay_images and kind=wsd must be set together (got kind={self.kind} and {self.decay_images}); set "
                f"both or neither"
            )
        return self


class NoiseConfig(Section):
    """Noise that is added to quantized pixels before the flow sees them."""

    kind: Literal["uniform", "gaussian", "none"] = "uniform"
    """``uniform``: dequantization inside the bin, for an exact likelihood and bits/dim.
    ``gaussian``: noise with standard deviation ``std``, for sample quality; the model then has no bits/dim.
    ``none``: no noise, for vectors; their likelihood is measured in nats."""
    std: float = Field(default=0.0, ge=0)
    """Standard deviation of the noise, for pixels on [-1, 1]; required by ``gaussian``."""

    @model_validator(mode="after")
    def _std_fits_kind(self) -> "NoiseConfig":
        if (self.kind == "gaussian") != (self.std > 0):
            raise ValueError(f"std must be > 0 for gaussian and 0 for other noise (got {self.kind} and {self.std})")
        return self


class SpikeConfig(Section):
    """How training reacts to a spike: a step with a loss far above the mean loss of the previous steps."""

    rule: Literal["off", "skip", "roll_back"] = "off"
    """``skip``: do not update the weights, as after a gradient that is not finite. ``roll_back``: weights, moments and
    averages return to the latest checkpoint, and training continues with the samples after the spike, so that it does
    not see the same samples again."""
    above_nats_per_dim: float = Field(default=0.5, gt=0)
    """A step is a spike if its loss exceeds the mean loss by more than this."""
    window_steps: int = Field(default=64, ge=2)
    """Number of previous steps in the mean; the rule applies once there are this many steps."""
    max_roll_backs: int = Field(default=5, ge=1)
    """Maximum number of roll-backs; the run stops if it needs more."""


class TrainingConfig(Section):
    """Length of training, batch sizes, seed, noise and moving averages."""

    total_images: int = Field(ge=1)
    """Number of images that the run has seen at its end; an image counts every time that it is used."""
    global_batch_size: int = Field(ge=1)
    """Number of images per optimizer step, over all ranks. It determines the order of samples."""
    micro_batch_size: int = Field(ge=1)
    """Number of images per rank in one forward pass; gradients accumulate until the global batch is complete."""
    seed: int = Field(default=0, ge=0, lt=2**64)
    """Seed of initial weights, order of samples, noise and label dropping."""
    noise: NoiseConfig = NoiseConfig()
    label_drop: float = Field(default=0.1, ge=0, le=1)
    """Probability that the label of a sample is dropped. This trains the unconditional model that guidance needs."""
    ema_half_life_images: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(50_000,), min_length=1)
    """Half-life, in images, of the exponential moving average of the weights; a list makes several averages.
    Validation and sample grids use the first average. It is also registered last, so that it is ``latest``."""
    max_skipped_steps: int = Field(default=10, ge=0)
    """Maximum number of consecutive steps that are skipped because the loss or gradient is not finite; with more, the
    run stops."""
    spike: SpikeConfig = SpikeConfig()
    max_seconds: float | None = Field(default=None, gt=0)
    """Training time after which the run saves its state and stops with exit code 75, for schedulers with a time limit.
    The same command continues the run."""
    threads: int = Field(default=0, ge=0)
    """Number of torch threads per rank on a CPU. 0 uses ``OMP_NUM_THREADS``, or an equal share of the cores."""

    @field_validator("ema_half_life_images", mode="before")
    @classmethod
    def _one_is_a_list_too(cls, value: Any) -> Any:
        return value if isinstance(value, list | tuple) else (value,)

    @field_validator("ema_half_life_images")
    @classmethod
    def _differ(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) < len(value):
            raise ValueError(f"half-lives must differ (got {list(value)}); remove one")
        return value


class ZeroPlusPlusConfig(Section):
    """ZeRO++ (arXiv 2306.10209): less traffic between nodes at stage 3, on CUDA."""

    secondary_partition_ranks: int = Field(default=1, ge=1)
    """hpZ: number of ranks that share a second copy of the weights, usually the ranks of a node, so that the backward
    pass gathers weights inside the node. A rank's part of the copy takes 4 bytes per parameter, divided by this number.
    1 turns hpZ off."""
    quantized_weights: bool = False
    """qwZ: weights are sent as int8."""
    quantized_gradients: bool = False
    """qgZ: gradients are sent as int4."""

    @property
    def enabled(self) -> bool:
        """Whether any of these settings is on."""
        return self != ZeroPlusPlusConfig()


class ParallelismConfig(Section):
    """DeepSpeed ZeRO. Stage 1 divides the optimizer's state among ranks, stage 2 also gradients, stage 3 also weights.

    The table shows the memory of a rank in bytes per parameter, for N ranks and E moving averages, without activations:
    memory that is always allocated, and additional memory in the backward pass. Buckets are two to four buffers of 50
    million numbers.

    ===== ================== ============= ===============================================================
    stage always             N = 8, E = 1  additional
    ===== ================== ============= ===============================================================
    0     12 + 4 E / N       12.5          gradients 4, and 4 for the copy that is reduced over ranks
    1     4 + (12 + 4 E) / N 6.0           4 / N and buckets; 4 and buckets where gradients accumulate
    2     4 + (12 + 4 E) / N 6.0           4 / N and buckets; 8 / N and buckets where gradients accumulate
    3     (20 + 4 E) / N     3.0           4 for gathered weights, at most a billion of them
    ===== ================== ============= ===============================================================

    Use stage 0 for models of up to about 0.2 billion parameters (4.1 GB), because it spends the least time waiting for
    buckets. Use stage 1 or 2 for 0.2 to 3 billion parameters, such as every published TarFlow; 3 billion parameters at
    stage 2 on 8 ranks need 20 GB per GPU. Both stages need the same memory unless gradients accumulate; then stage 2
    saves memory, but reduces gradients over ranks for every micro batch. Use stage 3 for larger models or small GPUs.
    Offloading saves more memory at the cost of speed: it moves the (16 + 4 E) / N bytes of the optimizer to main
    memory. The verb ``plan`` computes memory, speed and traffic of a recipe at all stages.
    """

    zero_stage: Literal[0, 1, 2, 3] = 2
    precision: Literal["fp32", "bf16"] = "fp32"
    """``bf16``: compute matrix products in bfloat16 by autocast; parameters, affine maps and sums stay fp32."""
    activations: Activations = "keep"
    """How the backward pass gets activations. ``keep``: from memory. ``checkpoint``: keep only the inputs of layers,
    and run each layer again. ``rebuild`` (Glow): invert the layers one by one, so that memory does not grow with depth.
    The last two take more time."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """``optimizer``: keep master weights, moments and averages in main memory, and update them on the CPU (stages 1 to
    3). ``all``: also keep the weights there, and fetch them when they are needed (stage 3)."""
    compile: bool = False
    """Compile the transformer layers of TarFlow or the coupling networks of Glow with torch.compile; the first step
    then takes about a minute."""
    zero_plus_plus: ZeroPlusPlusConfig = ZeroPlusPlusConfig()

    @model_validator(mode="after")
    def _stage_allows(self) -> "ParallelismConfig":
        stage = self.zero_stage
        if self.offload == "optimizer" and stage == 0:
            raise ValueError("offload=optimizer needs zero_stage 1, 2 or 3 (got 0); raise zero_stage")
        if self.offload == "all" and stage != 3:
            raise ValueError(f"offload=all needs zero_stage 3 (got {stage}); use offload=optimizer or zero_stage=3")
        if self.zero_plus_plus.enabled and stage != 3:
            raise ValueError(f"zero_plus_plus needs zero_stage 3 (got {stage}); raise zero_stage or remove the section")
        if self.compile and self.activations == "rebuild":
            raise ValueError("compile needs activations=keep or checkpoint (got rebuild); use checkpoint")
        return self


class CheckpointConfig(Section):
    """Checkpoints, from which a run resumes: how often they are written, and which are kept."""

    every_images: int = Field(ge=1)
    """Number of images between checkpoints; rounded up to whole steps."""
    keep_last: int = Field(default=2, ge=1)
    """Number of newest checkpoints to keep; older ones are deleted."""
    keep_every_images: int | None = Field(default=None, ge=1)
    """Also keep, permanently, the first checkpoint at or after each multiple of this number of images."""
    upload_path: str | None = None
    """Folder or URL to which complete checkpoints are copied in the background. A run resumes from there if its own
    folder has no newer checkpoint. ``keep_last`` and ``keep_every_images`` also apply there."""


class ValidationConfig(DataSetConfig):
    """Measurement of bits/dim on held-out images during training, with averaged weights."""

    every_images: int = Field(ge=1)
    """Number of training images between validations."""
    num_images: int | None = Field(default=None, ge=1)
    """Number of held-out images, from the start of the data set; None uses all."""


class LoggingConfig(Section):
    """The folder of a run, and the logs and sample grids in it."""

    path: str
    """Folder of the run, for ``config.yaml``, ``environment.json``, ``status.json``, ``log.jsonl``, ``curve.png``,
    ``checkpoints/``, ``previews/`` and ``model/``."""
    every_images: int = Field(default=2_000, ge=1)
    """Number of images between lines of ``log.jsonl``."""
    preview_every_images: int = Field(default=50_000, ge=1)
    """Number of images between sample grids."""
    preview_guidance: float = Field(default=0.0, ge=0)
    """Guidance scale of the sample grids."""
    tensorboard: bool = False
    """Also write event files of TensorBoard to ``tensorboard/``; needs the extra ``tensorboard``."""
    wandb_project: str | None = None
    """Project of Weights & Biases to which the run is also logged; needs the package ``wandb``. The id of the W&B run
    is stored in ``wandb-id.json``. If the folder is copied, the copy logs to a new W&B run."""
    peak_flops: float | None = Field(default=None, gt=0)
    """Peak operations per second (FLOP/s) of each rank's device, for the model FLOPs utilization (MFU) in the log. None
    uses the dense bf16 peak of common GPUs, and logs no MFU for other devices."""


class Recipe(Section):
    """The sections that determine memory, traffic and speed of a training step."""

    model: ModelConfig
    optimizer: OptimizerConfig
    training: TrainingConfig
    parallelism: ParallelismConfig

    @model_validator(mode="after")
    def _sections_fit(self) -> Self:
        _check_recipe(self.model, self.optimizer, self.training, self.parallelism)
        return self


class TrainConfig(Root):
    """Train on shards, write checkpoints, a log and sample grids, and register the model as a version."""

    OMITTED_AT_DEFAULT: ClassVar[frozenset[str]] = frozenset({"autoencoder"})
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
    autoencoder: VersionConfig | None = None
    """Of a flow on latents: the registered autoencoder that made them; the flow is registered together with it."""

    @model_validator(mode="after")
    def _sections_fit(self) -> Self:
        _check_recipe(self.model, self.optimizer, self.training, self.parallelism)
        guidance = self.logging.preview_guidance
        if guidance > 0 and not self.model.class_conditional:
            raise ValueError(
                f"logging.preview_guidance needs model.class_conditional=true (got {guidance} and false); set "
                f"preview_guidance to 0"
            )
        if guidance > 0 and not self.model.capabilities.guidance:
            raise ValueError(
                f"logging.preview_guidance has no effect on model.kind={self.model.kind} (got {guidance}); set it to 0"
            )
        warmup, decay, total = self.schedule.warmup_images, self.schedule.decay_images, self.training.total_images
        if warmup + (decay or 0) >= total:
            names, got = "schedule.warmup_images", str(warmup)
            if decay:
                names, got = f"{names} + schedule.decay_images", f"{warmup} + {decay} = {warmup + decay}"
            raise ValueError(
                f"{names} must be below training.total_images (got {got}, and {total}); lower "
                f"{names}, or raise training.total_images"
            )
        return self

    @property
    def recipe(self) -> Recipe:
        """The sections that determine memory and speed."""
        return Recipe(model=self.model, optimizer=self.optimizer, training=self.training, parallelism=self.parallelism)


def _check_recipe(
    model: ModelConfig, optimizer: OptimizerConfig, training: TrainingConfig, parallelism: ParallelismConfig
) -> None:
    """Check rules that concern several sections.

    Raises:
        ValueError: two sections contradict each other.
    """
    batch, micro = training.global_batch_size, training.micro_batch_size
    kind, capabilities = model.kind, model.capabilities
    if batch % micro:
        raise ValueError(
            f"training.global_batch_size must be a multiple of training.micro_batch_size "
            f"(got {batch} and {micro}); use {micro * max(1, batch // micro)}"
        )
    if model.logit_alpha is not None and training.noise.kind != "uniform":
        raise ValueError(
            f"model.logit_alpha needs training.noise.kind=uniform, which stays inside [-1, 1] (got "
            f"{training.noise.kind}); remove model.logit_alpha, or set the noise to uniform"
        )
    if model.dequantization is not None and training.noise.kind != "uniform":
        raise ValueError(
            f"model.dequantization needs training.noise.kind=uniform, which stays in the bins of pixels (got "
            f"{training.noise.kind}); remove model.dequantization, or set the noise to uniform"
        )
    if parallelism.activations not in capabilities.activations:
        raise ValueError(
            f"parallelism.activations must be {' or '.join(capabilities.activations)} for this model (got "
            f"{parallelism.activations} and model.kind={kind}); use {capabilities.activations[-1]}"
        )
    if parallelism.zero_stage == 3 and not capabilities.divided_weights:
        raise ValueError(
            f"parallelism.zero_stage=3, which divides weights, is not supported for model.kind={kind} (got both); use 2"
        )
    muon = optimizer.kind == "muon"
    if not capabilities.separate_networks and (parallelism.compile or muon):
        raise ValueError(
            f"parallelism.compile and optimizer.kind=muon are not supported for model.kind={kind} (got at least one "
            f"of them); remove them"
        )
    if muon and parallelism.zero_stage not in (1, 2):
        raise ValueError(
            f"optimizer.kind=muon needs parallelism.zero_stage 1 or 2 (got {parallelism.zero_stage}); change either"
        )
    if muon and parallelism.offload != "none":
        raise ValueError(
            f"optimizer.kind=muon needs parallelism.offload=none (got {parallelism.offload}); change either"
        )


VERB = Verb(
    "verbs.train.driver",
    TrainConfig,
    "train a flow on shards under DeepSpeed and register it",
    "launch/torchrun.sh 2 configs/train/digits.yaml optimizer.peak_lr=1e-3",
    imports="PyTorch",
)
