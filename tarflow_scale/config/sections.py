"""The sections of evaluation, generation and the registry, in the order in which a batch meets them.

A verb's root (`tarflow_scale.config.roots`) is composed of these. Functions get their section, never a root.
Defaults live here and nowhere else; the text under a field is its documentation, printed by ``--help``.
"""

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from tarflow_scale.config.base import Section
from tarflow_scale.config.training import NoiseConfig

__all__ = [
    "BrowseConfig",
    "ClusterConfig",
    "CommandConfig",
    "FlowOutputConfig",
    "ForeignWeightsConfig",
    "GateRef",
    "GuardConfig",
    "Guidance",
    "Labels",
    "MetricsConfig",
    "NamedLabels",
    "ReferenceConfig",
    "RegistryConfig",
    "SamplingConfig",
    "ScoringConfig",
    "VersionConfig",
]

Labels = Literal["balanced"] | tuple[int, ...] | dict[int, float]
"""``balanced``: image i has label i modulo the number of classes. A list: its labels in turn. A mapping: each label is
drawn with its weight."""
NamedLabels = Literal["balanced"] | tuple[int | str, ...] | dict[int | str, float]
"""The same, where classes may be named."""
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
"""A name that is also a safe file name."""


class RegistryConfig(Section):
    """A registry and one model in it."""

    path: str
    """Folder or URL of the registry."""
    model: Name
    """Name of the model."""


class VersionConfig(RegistryConfig):
    """One version of a model."""

    version: int | str = "latest"
    """A number, an alias such as ``champion``, or ``latest``: the newest that is not retired, and for ``promote`` the
    newest of these that has the numbers that the gate asks for."""


class BrowseConfig(Section):
    """A registry to look at (verb ``models``)."""

    path: str
    """Folder or URL of the registry."""
    model: Name | None = None
    """Name of a model; ``list`` shows all models without it, the other commands need it."""
    version: int | str = "latest"
    """A number, an alias such as ``champion``, or ``latest``; for ``rollback`` the alias."""


class CommandConfig(Section):
    """What commands of the verb ``models`` need beside a version."""

    other: int | str | None = None
    """``diff``: the version to compare with; None takes the champion."""
    alias: Name | None = None
    """``alias``: the alias to point to the version."""
    reason: str = ""
    """``alias``, ``approve``, ``retire``, ``rollback``, ``import``: why; stored."""
    path: str | None = None
    """``export``: folder or URL to write; ``import``: to read."""
    licence: str = "other"
    """``export``: SPDX identifier for the model card."""
    samples: bool = True
    """``export``: draw samples for the model card where no report has any; a large model without a GPU takes long."""
    delete: bool = False
    """``collect``: remove what is listed; without it, it is only listed."""
    grace_days: float = Field(default=7.0, ge=0.125)
    """``collect``: what was retired, or written without ever being named, is kept so long."""
    single_writer: bool = False
    """``init``: promise that one process alone writes, for stores without create-if-absent."""
    shared: Literal["umask", "group", "all"] = "umask"
    """``init``: who may use the files of a local registry, whatever the umask of their writer, as git's
    ``core.sharedRepository``. ``umask``: the umask decides. ``group``: the group of the folder may read and write.
    ``all``: that, and all others may read. Set on a registry that is there, it also adds the modes that are missing."""


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
    blocks: Literal["all", "first"] = "all"
    """TarFlow: where it acts. ``first``: in the block that is decoded first alone, as in STARFlow (arXiv 2506.06276),
    which halves the work of the others."""

    @model_validator(mode="after")
    def _has_an_effect(self) -> "Guidance":
        if self.scale == 0 and self != Guidance.model_construct():
            raise ValueError("the other keys of guidance have no effect at scale=0; set a scale")
        return self


class DecoderConfig(Section):
    """How the latents of a TarFlow become images; the other flows have one way."""

    kind: Literal["exact", "adaptive"] = "exact"
    """``exact``: token by token. ``adaptive``: several tokens at once where a plan, which ``generate --calibrate``
    measures, says that it is faster."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the transformers and their cache; scale and mean are fp32 in any case."""
    tolerance: float = Field(default=1e-3, gt=0)
    """``adaptive``: tokens are iterated until no feature moves by more, on the scale of [-1, 1]."""


class SamplingConfig(Section):
    """How the flow is sampled. Image i depends on (weights, seed, i) and these settings, not on the batch."""

    batch_size: int | None = Field(default=128, ge=1)
    """Images decoded together; None takes as many as fit in the device's free memory, at most 1,024."""
    decoder: DecoderConfig = DecoderConfig()
    guidance: Guidance = Guidance()
    temperature: float = Field(default=1.0, ge=0)
    """Standard deviation of the latent."""
    denoise: float = Field(default=0.0, ge=0)
    """Strength of one Tweedie step, for models trained with Gaussian noise: 1 removes the noise in the mean, 0 is
    off."""


class GuardConfig(Section):
    """Which images are not kept. Image i is drawn again with its next latent until it is good."""

    saturated_share: float | None = Field(default=None, gt=0, le=1)
    """An image is bad if a larger share of its values lies outside [-1, 1] by more than a level; None accepts any.
    Values that are not finite are always bad."""
    attempts: int = Field(default=3, ge=0)
    """Times that an image may be drawn again; one that is bad after that ends the generation."""
    most_redrawn_share: float = Field(default=0.01, ge=0, le=1)
    """A larger share of images that were drawn again ends the generation: the model is at fault, not chance. Three
    are let pass, however few are made; none at 0."""


class SeededSamplingConfig(SamplingConfig):
    """Sampling of the verb ``generate``."""

    seed: int = Field(default=0, ge=0, lt=2**64)
    """Seed of the latents, and of labels that are drawn."""
    num_images: int = Field(ge=1)
    """Images to generate."""
    labels: NamedLabels = "balanced"
    """``balanced``: the classes in turn. A list such as ``[3, 3, 7]``: its labels in turn. A mapping such as
    ``{0: 1, 7: 2.5}``: each label is drawn with its weight. Labels are numbers or names of classes, as
    ``prepare --stats`` lists them. For a model with classes."""
    guard: GuardConfig = GuardConfig()


class MetricsConfig(Section):
    """What is measured."""

    protocols: tuple[str, ...] = Field(min_length=1)
    """Protocol files, one for each number; see ``evals/protocols/``."""
    extractor_weights: dict[str, str] = Field(default_factory=dict)
    """Weights files by name of the extractor; Inception's is also looked for in the torch hub cache. The sha256 of each
    is checked, and is part of the protocol id."""
    baselines: bool = True
    """Also measure a full-covariance Gaussian fitted to the reference, and real images, by the same protocols."""
    watch_seconds: float = Field(default=30.0, gt=0)
    """Between looks at the registry with ``--watch``."""


class ReferenceConfig(Section):
    """The real images that distances are measured to."""

    path: str
    """The data set: folder or URL that holds ``manifest.json``."""
    cache: str
    """Folder or URL that all workers see, where reference statistics are kept, and parts of evaluations on their
    way."""


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
    start_seconds: float = Field(default=0.0, ge=0)
    """How long to wait for a cluster whose machines are still joining, before it is too small for the workers."""


class ScoringConfig(Section):
    """How images are scored, and where the table goes (verb ``score``)."""

    path: str
    """Folder or URL for ``scores.csv`` (or ``.parquet``) and ``summary.json``; parts on their way are in it too."""
    format: Literal["csv", "parquet"] = "csv"
    """Of the table; ``parquet`` needs the extra ``parquet``."""
    false_alarm_rate: float = Field(default=0.05, gt=0, lt=1)
    """An image is flagged above the score that this share of the held-out normal images exceeds."""
    num_draws: int = Field(default=1, ge=1)
    """Dequantisation draws per image; the log of their mean density counts."""
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


class ForeignWeightsConfig(Section):
    """Weights that another project saved (verb ``convert``)."""

    path: str
    """The ``.pth`` that apple/ml-tarflow's train.py saved; path or URL."""
    num_channels: int | None = Field(default=None, ge=1)
    """Channels of the images; None infers 1 or 3 from the size of a token."""
    noise: NoiseConfig
    """Noise of the training, which is not in the file but in its name: ``..._0.05.pth`` is
    ``{kind: gaussian, std: 0.05}``, ``..._uniform.pth`` is ``{kind: uniform}``."""

    @model_validator(mode="after")
    def _is_of_images(self) -> "ForeignWeightsConfig":
        if self.noise.kind == "none":
            raise ValueError("weights.noise must be uniform or gaussian (got none, which is for vectors); correct it")
        return self


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
    against: str | None = None
    """A version of another model of the registry, such as ``other-model@champion``, that must be beaten as well in each
    requirement with ``must_beat_champion``. Both must be trained on the same data set and have numbers with the same
    protocol ids. The alias of the other model must exist, and does not move."""
    reason: str = ""
    """Why, in the words of the person who promotes; stored."""
    override: str | None = None
    """Promote although the gate says no, for this reason; decision and reason are recorded. The flag
    ``--override`` sets it."""

    @field_validator("against")
    @classmethod
    def _names_a_version(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}@[A-Za-z0-9][A-Za-z0-9._-]*", value):
            raise ValueError(f"against must be MODEL@VERSION (got {value!r}); for example other-model@champion")
        return value

    @model_validator(mode="after")
    def _says_what_it_must(self) -> "GateRef":
        if self.alias == "latest" or self.alias.isdigit():
            raise ValueError(f"alias must be a name other than latest (got {self.alias}); for example champion")
        if self.override is not None and not self.override.strip():
            raise ValueError("override must be a reason (got none); say why, it is recorded")
        return self
