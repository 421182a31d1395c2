"""Configuration of the verb ``train``: optimizer, schedule, length, checkpoints, validation, log.

Progress is counted in images, so that it does not depend on the batch size and the number of ranks.
"""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from tarflow_scale.config.autoencoder import ConvolutionalConfig, TunedDecoderConfig
from tarflow_scale.config.base import Root, Section
from tarflow_scale.config.data import DataConfig, DataSetConfig
from tarflow_scale.config.model import FlowConfig
from tarflow_scale.config.parallelism import ParallelismConfig
from tarflow_scale.config.verb import Verb
from tarflow_scale.config.versions import RegistryConfig, VersionConfig

__all__ = [
    "VERB",
    "CheckpointConfig",
    "LoggingConfig",
    "NoiseConfig",
    "OptimizerConfig",
    "Recipe",
    "ScheduleConfig",
    "SpikeConfig",
    "TrainConfig",
    "TrainedConfig",
    "TrainingConfig",
    "ValidationConfig",
]

TrainedConfig = Annotated[FlowConfig | ConvolutionalConfig | TunedDecoderConfig, Field(discriminator="kind")]
"""The model to train: a flow, an autoencoder, or the decoder of a registered autoencoder."""


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
    """Noise that is added to quantized pixels, or to latents, before the model sees them."""

    kind: Literal["uniform", "gaussian", "none"] = "uniform"
    """``uniform``: dequantization inside the bin, for an exact likelihood and bits/dim.
    ``gaussian``: noise with standard deviation ``std``, for sample quality; the model then has no bits/dim.
    ``none``: no noise, for vectors, whose likelihood is measured in nats, and for autoencoders."""
    std: float = Field(default=0.0, ge=0)
    """Standard deviation of the noise; required by ``gaussian``. The unit is that of pixels on [-1, 1]; for latents it
    is the standard deviation of each channel."""

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

    OMITTED_AT_DEFAULT: ClassVar[frozenset[str]] = frozenset({"latent_norm_weight"})
    total_images: int = Field(ge=1)
    """Number of images that the run has seen at its end; an image counts every time that it is used."""
    global_batch_size: int = Field(ge=1)
    """Number of images per optimizer step, over all ranks. It determines the order of samples."""
    micro_batch_size: int = Field(ge=1)
    """Number of images per rank in one forward pass; gradients accumulate until the global batch is complete."""
    seed: int = Field(default=0, ge=0, lt=2**64)
    """Seed of initial weights, order of samples, noise and label dropping."""
    noise: NoiseConfig = NoiseConfig()
    latent_norm_weight: float = Field(default=0.0, ge=0)
    """TarFlow: weight, in the loss per dimension, of the mean square of the tokens between each two blocks (STARFlow
    uses 1e-4); it keeps their scale from growing. The log shows the likelihood without this term."""
    label_drop: float = Field(default=0.1, ge=0, le=1)
    """Probability that the label of a sample is dropped. This trains the unconditional model that guidance needs. No
    effect on autoencoders."""
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
    """Measurement of the loss on held-out images during training, with averaged weights."""

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

    model: TrainedConfig
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
    model: TrainedConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    training: TrainingConfig
    parallelism: ParallelismConfig = ParallelismConfig()
    checkpoint: CheckpointConfig
    validation: ValidationConfig | None = None
    logging: LoggingConfig
    registry: RegistryConfig
    autoencoder: VersionConfig | None = None
    """A registered autoencoder. For a flow on latents: one whose encoder made them; the flow is registered together
    with it. For ``model.kind=decoder``: the autoencoder to start from."""

    @model_validator(mode="after")
    def _sections_fit(self) -> Self:
        _check_recipe(self.model, self.optimizer, self.training, self.parallelism)
        _check_autoencoder(self.model, self.autoencoder)
        guidance = self.logging.preview_guidance
        if guidance > 0 and isinstance(self.model, FlowConfig) and not self.model.class_conditional:
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
    model: TrainedConfig, optimizer: OptimizerConfig, training: TrainingConfig, parallelism: ParallelismConfig
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
    _check_noise(model, training.noise.kind)
    if parallelism.activations not in capabilities.activations:
        raise ValueError(
            f"parallelism.activations must be {' or '.join(capabilities.activations)} for this model (got "
            f"{parallelism.activations} and model.kind={kind}); use {capabilities.activations[-1]}"
        )
    if parallelism.zero_stage == 3 and not capabilities.divided_weights:
        raise ValueError(
            f"parallelism.zero_stage=3, which divides weights, is not supported for model.kind={kind} (got both); use 2"
        )
    if training.latent_norm_weight > 0 and kind != "tarflow":
        raise ValueError(
            f"training.latent_norm_weight has no effect on model.kind={kind} (got {training.latent_norm_weight:g}); "
            f"remove it"
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


def _check_noise(model: TrainedConfig, noise: str) -> None:
    """Check that the model can be trained with this kind of noise.

    Raises:
        ValueError: it cannot.
    """
    match model:
        case ConvolutionalConfig():
            if noise != "none":
                raise ValueError(
                    f"training.noise has no effect on model.kind=autoencoder (got {noise}); set "
                    f"training.noise.kind=none"
                )
        case TunedDecoderConfig():
            if noise == "uniform":
                raise ValueError(
                    "training.noise.kind must be gaussian or none for model.kind=decoder, whose noise is added to "
                    "latents (got uniform); change training.noise.kind"
                )
        case _:
            needs = {"logit_alpha": "which stays inside [-1, 1]", "dequantization": "which stays in the bins of pixels"}
            for key, reason in needs.items():
                if getattr(model, key) is not None and noise != "uniform":
                    raise ValueError(
                        f"model.{key} needs training.noise.kind=uniform, {reason} (got {noise}); remove model.{key}, "
                        f"or set the noise to uniform"
                    )


def _check_autoencoder(model: TrainedConfig, autoencoder: VersionConfig | None) -> None:
    """Check the section ``autoencoder``: a decoder requires it, and a new autoencoder forbids it.

    Raises:
        ValueError: the section is missing, or would have no effect.
    """
    if isinstance(model, TunedDecoderConfig) and autoencoder is None:
        raise ValueError(
            "model.kind=decoder needs the section autoencoder, the version to start from (got none); set "
            "autoencoder.path, autoencoder.model and autoencoder.version"
        )
    if isinstance(model, ConvolutionalConfig) and autoencoder is not None:
        raise ValueError(
            f"the section autoencoder has no effect on model.kind=autoencoder (got {autoencoder.model}); remove it, or "
            f"set model.kind=decoder to train the decoder of that version"
        )


VERB = Verb(
    "verbs.train.driver",
    TrainConfig,
    "train a flow or an autoencoder on shards under DeepSpeed and register it",
    "launch/torchrun.sh 2 configs/train/digits.yaml optimizer.peak_lr=1e-3",
    imports="PyTorch",
)
