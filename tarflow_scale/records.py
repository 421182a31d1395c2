"""Records that verbs store and pass to each other: small, typed, independent of torch.

Field names contain units. Unknown fields are an error, so an old program never ignores fields of a newer record.
Some records contain a section of the configuration, such as the sampling settings. Reading the record validates this
section, and settings that did not exist when the record was written get their defaults.
"""

import hashlib
import json
from collections.abc import Iterator
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tarflow_scale.config.data import ImageSize
from tarflow_scale.config.sampling import GuardConfig, Guidance, SamplingConfig
from tarflow_scale.errors import DataError, RegistryError, UserError

__all__ = [
    "BlockDecoding",
    "Calibration",
    "DataSetFacts",
    "FileRecord",
    "GenerationPlan",
    "LatentFacts",
    "MetricValue",
    "MetricsReport",
    "ModelVersion",
    "PixelFormat",
    "Record",
    "VectorFacts",
    "canonical_json",
    "changes",
    "leaves",
]

_SHOWN_CHANGES, _SHOWN_CHARACTERS = 4, 40


def canonical_json(value: Any) -> bytes:
    """Canonical JSON, for digests: sorted keys, no spaces, UTF-8, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False).encode()


def changes(before: Any, now: Any) -> str:
    """Differences between two nested mappings, such as ``optimizer.peak_lr was 0.001, is 0.0003``; empty if equal."""
    old, new = dict(leaves(before)), dict(leaves(now))
    differing = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    shown = [f"{key} was {_brief(old.get(key))}, is {_brief(new.get(key))}" for key in differing[:_SHOWN_CHANGES]]
    more = len(differing) - _SHOWN_CHANGES
    return "; ".join([*shown, f"and {more} more"] if more > 0 else shown)


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ``("section.key", value)`` for every value of nested mappings; an empty mapping counts as a value."""
    if isinstance(value, dict) and value:
        for name, part in value.items():
            yield from leaves(part, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


def _brief(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}.."


class Record(BaseModel):
    """Base class of records: immutable; refuses unknown fields, NaN and infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    def to_json(self) -> bytes:
        """The record as canonical JSON."""
        return canonical_json(self.model_dump(mode="json"))

    @classmethod
    def from_json(cls, content: bytes, origin: str, failure: type[UserError] = RegistryError) -> Self:
        """Parse JSON; ``origin`` names the file in the error.

        Raises:
            UserError: the content is not a valid record of this class; the type of the error is ``failure``.
        """
        try:
            return cls.model_validate_json(content)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "content"
            raise failure(
                f"{origin} is not a {cls.__name__} ({where}: {first['msg']}); the file is damaged, or another "
                f"version of tarflow-scale wrote it"
            ) from error


class FileRecord(Record):
    """Digest and size of a stored file."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)


class PixelFormat(Record):
    """How uint8 pixels are converted to floats on [-1, 1] for training, and back after sampling."""

    bit_depth: int = Field(ge=1, le=8)
    noise: Literal["uniform", "gaussian", "none"]
    """``uniform``: uniform dequantization, for an exact likelihood. ``gaussian``: added Gaussian noise, for which
    bits/dim are undefined. ``none``: no noise, for vectors of floats."""
    noise_std: float = Field(default=0.0, ge=0)
    """Standard deviation of the Gaussian noise, on [-1, 1] or in units of standardised latents; 0 for other kinds."""


class VectorFacts(Record):
    """Shape of the samples of a data set of vectors."""

    num_values: int = Field(ge=1)
    """Length D of a vector."""
    num_conditions: int = Field(default=0, ge=0)
    """Number K of condition values per vector."""


class LatentFacts(Record):
    """Latents of an autoencoder, of which a data set consists."""

    autoencoder: str
    """SHA-256 of the encoder, see `tarflow_scale.autoencoders.stored.digest_of`."""
    shape: tuple[int, int, int]
    """``(C, h, w)`` of a latent."""
    image_shape: tuple[int, int, int]
    """``(K, H, W)`` of an image."""
    bit_depth: int = Field(ge=1, le=8)
    """Bits of a pixel of the images."""
    has_variance: bool
    """Whether each latent is a Gaussian, stored as mean and log-variance, or one value."""
    dtype: Literal["float16", "bfloat16", "float32"]
    """Type of the stored numbers."""
    has_mirrored: bool = False
    """Whether the latent of the mirrored image is stored, too."""
    mean: tuple[float, ...]
    """Mean of each channel over the training split."""
    scale: tuple[float, ...]
    """Standard deviation of each channel over the training split."""


class DataSetFacts(Record):
    """Properties of the training data, stored with a registered model."""

    name: str
    split: str
    digest: str
    """SHA-256 of the manifest."""
    image_size_pixels: ImageSize
    num_channels: int
    class_names: tuple[str, ...]
    num_images: int
    vectors: VectorFacts | None = None
    """Shape of the vectors; None for other events."""
    latents: LatentFacts | None = None
    """The latents of an autoencoder; None for other events."""

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 if there are no labels."""
        return len(self.class_names)


class ModelVersion(Record):
    """An immutable version of a model in the registry: the digests of its files, and how they were made."""

    version: int = Field(ge=1)
    files: dict[str, FileRecord]
    pixels: PixelFormat
    data: DataSetFacts | None
    """Training data; None if they are not known, as for an autoencoder of another project."""
    parameters: int
    images_seen: int | None
    """Images seen in training; None if unknown, as for converted weights."""
    ema_half_life_images: int | None
    config_digest: str
    """SHA-256 of the resolved configuration that made this version."""
    git_commit: str
    packages: dict[str, str]
    configuration: FileRecord | None = None
    """The resolved configuration as JSON; None for converted weights."""
    checkpoint: str = ""
    """Path of the last checkpoint and SHA-256 of its manifest; empty for converted weights."""
    started_from: str = ""
    """Version from which training started, as ``model@version``, and its `weights_digest`; empty if training started
    from random weights, or if this is not known."""

    @property
    def is_autoencoder(self) -> bool:
        """Whether the version is an autoencoder; a flow on latents also has the files of its autoencoder."""
        return "autoencoder.json" in self.files and "config.json" not in self.files

    @property
    def trained_on(self) -> DataSetFacts:
        """Training data of a flow.

        Raises:
            DataError: the version is an autoencoder.
        """
        if self.is_autoencoder or self.data is None:
            raise DataError(f"version {self.version} is an autoencoder; name the version of a flow")
        return self.data

    @property
    def weights_digest(self) -> str:
        """A single SHA-256, computed from the names and digests of all files."""
        return hashlib.sha256(canonical_json({name: file.sha256 for name, file in self.files.items()})).hexdigest()


class MetricValue(Record):
    """The value of a metric, with its unit, standard error, number of samples and protocol."""

    value: float
    unit: str
    standard_error: float | None = None
    """Bits/dim: standard deviation over images / sqrt(number of images). Other metrics: jackknife over 50 blocks."""
    num_images: int = Field(ge=1)
    protocol: str
    """Name of the protocol."""
    protocol_digest: str
    """SHA-256 of the resolved protocol file."""
    protocol_id: str
    """Hash of the resolved protocol, extractor and reference; only values with equal ids are compared."""
    per_image: FileRecord | None = None
    """A safetensors file with the value of each image, in the order of the split; only for likelihood metrics."""


class MetricsReport(Record):
    """All metrics from one evaluation of one version."""

    model: str
    version: int
    weights_digest: str
    metrics: dict[str, MetricValue]
    baselines: dict[str, float]
    """The same metrics for a fitted Gaussian or real images: ``gaussian_bits_per_dim``, ``real_frechet_pixels``, ..."""
    sampling: SamplingConfig
    seconds: float
    packages: dict[str, str]
    grid: FileRecord | None = None
    """A PNG of the first samples."""


class BlockDecoding(Record):
    """Settings for decoding one block of a flow."""

    chunk: int = Field(ge=1)
    """Number of tokens that are decoded together; 1 decodes token by token."""
    planned: int = Field(ge=1)
    """Number of iterations of a chunk before the first test for convergence."""


class Calibration(Record):
    """The fastest settings for decoding the blocks of a flow, as measured on one device, with their error."""

    tensors_digest: str
    """Digest of the weights of the flow."""
    device: str
    batch_size: int = Field(ge=1)
    guidance: Guidance
    precision: str
    tolerance: float = Field(gt=0)
    blocks: tuple[BlockDecoding, ...]
    """Settings of the blocks, in the order of decoding."""
    iterations: tuple[float, ...]
    """For each block, the mean number of iterations of its chunks."""
    max_error: float
    """Largest absolute difference between a pixel and the same pixel decoded exactly, for pixels on [-1, 1]."""
    mean_error: float
    """Mean absolute difference between a pixel and the same pixel decoded exactly."""
    pixels_within_one_level: float
    """Share of 8-bit pixels that differ from exact decoding by at most one level."""
    exact_seconds: float
    adaptive_seconds: float


class GenerationPlan(Record):
    """All settings that determine the bytes of a generated data set; the plan is stored in the output folder."""

    model: str
    version: int
    weights_digest: str
    seed: int
    num_images: int
    samples_per_shard: int
    sampling: SamplingConfig
    labels: Literal["balanced", "none"] | tuple[int, ...] | dict[int, float]
    """``balanced``: image i has label i modulo the number of classes. For the other forms see ``sampling.labels``."""
    class_names: tuple[str, ...]
    image_size_pixels: ImageSize
    num_channels: int
    pixels: PixelFormat
    device: Literal["cpu", "cuda"]
    """The kind of device that decodes images; it affects the last bits of floats."""
    threads: int
    """Number of torch threads of a worker; it affects the last bits of sums."""
    decoding: Calibration | None = None
    """Calibration of the adaptive decoder; None decodes token by token."""
    codec: Literal["png", "webp", "jpeg", "raw"] = "png"
    """File format of the images."""
    jpeg_quality: int = 95
    guard: GuardConfig = GuardConfig()

    @property
    def vectors(self) -> VectorFacts | None:
        """Shape of the vectors; None for images."""
        return VectorFacts(num_values=self.num_channels) if self.pixels.noise == "none" else None

    @property
    def latents(self) -> LatentFacts | None:
        """None: a flow on latents generates images."""
        return None
