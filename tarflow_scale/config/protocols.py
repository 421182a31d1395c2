"""Protocols and gates: files in ``evals/`` that define how a metric is measured and which values a promotion needs."""

import hashlib
import json
from typing import Annotated, ClassVar, Literal

from pydantic import Field, RootModel, model_validator

from tarflow_scale.config.base import Section, load_named
from tarflow_scale.config.versions import Name

__all__ = [
    "BitsPerDimProtocol",
    "BoundProtocol",
    "FrechetProtocol",
    "GateConfig",
    "InceptionScoreProtocol",
    "KernelProtocol",
    "LatentNatsProtocol",
    "LikelihoodProtocol",
    "ManifoldProtocol",
    "NatsProtocol",
    "PerImageProtocol",
    "Protocol",
    "Requirement",
    "SampledProtocol",
    "SimilarityProtocol",
    "load_gate",
    "load_protocol",
]


class _Protocol(Section):
    higher_is_better: ClassVar[bool] = False
    """Whether a larger number is better."""
    name: Name
    """Name of the metric in reports."""

    @property
    def reconstructs(self) -> bool:
        """Whether the protocol measures reconstructions by an autoencoder, and not a flow."""
        return False

    @property
    def digest(self) -> str:
        """SHA-256 of the resolved protocol; part of the protocol id."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


class _LikelihoodProtocol(_Protocol):
    """Negative log-likelihood of a whole split; the value of each sample is stored."""

    labels: Literal["given", "none"] = "given"
    """``given``: measure log p(x | y) of a class-conditional flow. ``none``: drop the labels."""


class NatsProtocol(_LikelihoodProtocol):
    """Mean negative log-likelihood of the vectors of a split, in nats per vector."""

    metric: Literal["nats"]

    @property
    def events(self) -> str:
        """Description of the data that the protocol can measure."""
        return "vectors"


class LatentNatsProtocol(_LikelihoodProtocol):
    """Mean negative log-likelihood of the stored latents of a split, in nats per dimension of standardised latents.

    Latents are drawn and get noise as in the validation of ``train``, so the number is the validation loss.
    """

    metric: Literal["latent_nats"]
    noise_std: float = Field(ge=0)
    """Standard deviation of the noise, in units of standardised latents; must equal that of the model's training."""
    num_draws: int = Field(default=1, ge=1)
    """Number of draws of latent and noise per image; the result is the mean of their nats."""
    seed: int = Field(default=0, ge=0)
    """Seed of the draws."""

    @property
    def events(self) -> str:
        """Description of the data that the protocol can measure."""
        return "latents"


class _DrawsProtocol(_LikelihoodProtocol):
    """Keys that are common to the likelihoods of images, which are averaged over random draws."""

    bit_depth: int = Field(ge=1, le=8)
    """Number of bits per pixel, for 2^bit_depth levels; must equal the bit depth of the data set."""
    num_draws: int = Field(default=1, ge=1)
    """Number of draws per image."""
    estimate: Literal["mean", "importance"] = "mean"
    """How the draws of an image are combined. ``mean``: the mean of their bits/dim, an upper bound on the bits/dim
    of the discrete image. ``importance``: the log of their mean density, a tighter bound, exact in the limit of many
    draws."""
    seed: int = Field(default=0, ge=0)
    """Seed of the draws."""

    @property
    def events(self) -> str:
        """Description of the data that the protocol can measure."""
        return f"{self.bit_depth}-bit images"


class BitsPerDimProtocol(_DrawsProtocol):
    """Negative log-likelihood of a whole split under uniform dequantization, in bits per dimension.

    A draw is one draw of dequantization noise.
    """

    metric: Literal["bits_per_dim"]


class BoundProtocol(_DrawsProtocol):
    """Bound on the negative log-likelihood of a split, in bits per dimension of pixels, for a flow on latents.

    A draw is a latent from the encoder's Gaussian, with the training noise; see `tarflow_scale.metrics.bound`. The
    distance between the bound and the likelihood is not known, so the number is never compared with ``bits_per_dim``.
    """

    metric: Literal["bits_per_dim_bound"]

    @model_validator(mode="after")
    def _is_named_a_bound(self) -> "BoundProtocol":
        if "bound" not in self.name.lower():
            raise ValueError(
                f"the name of a protocol with metric=bits_per_dim_bound must contain the word bound, because tables "
                f"show the name (got {self.name}); use name: {self.name}_bound"
            )
        return self


LikelihoodProtocol = NatsProtocol | LatentNatsProtocol | BitsPerDimProtocol | BoundProtocol
"""A protocol that measures the likelihood of each sample of a split."""


class SimilarityProtocol(_Protocol):
    """Mean similarity of the images of a split and their reconstructions by an autoencoder; every value is stored.

    An image is decoded from the mean of its latents, and its pixels are quantized to the nearest level.
    """

    higher_is_better: ClassVar[bool] = True
    metric: Literal["psnr", "ssim"]
    """``psnr``: peak signal-to-noise ratio in dB. ``ssim``: structural similarity (Wang et al., 2004), at most 1; see
    `tarflow_scale.autoencoders.similarity`."""
    bit_depth: int = Field(ge=1, le=8)
    """Number of bits per pixel; must equal the bit depth of the data set."""

    @property
    def reconstructs(self) -> bool:
        """Always true."""
        return True

    @property
    def events(self) -> str:
        """Description of the data that the protocol can measure."""
        return f"{self.bit_depth}-bit images"


PerImageProtocol = LikelihoodProtocol | SimilarityProtocol
"""A protocol that gives a value to each sample of a split."""


class _SampledProtocol(_Protocol):
    """Keys that are common to all protocols for generated images."""

    extractor: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    """Function from an image to features. ``pixels``: the flattened image in levels 0..2^bit_depth-1.
    ``inception-v3-compat``: torch-fidelity's port of the Inception network that defines FID. ``dinov2-vitl14``: the
    network of FD-DINOv2. Another package can add extractors as entry points in the group ``tarflow_scale.extractors``.
    """
    extractor_sha256: str | None = None
    """Required SHA-256 of the weights file of the extractor. With None, ``inception-v3-compat`` is checked against the
    published digest prefix 6726825d. ``pixels`` has no weights file."""
    num_images: int = Field(ge=2)
    """Number of generated images, or of reconstructed images from the start of a split."""
    seed: int = Field(default=0, ge=0)
    """Seed of the latents."""
    labels: Literal["balanced"] = "balanced"
    """Image i has label i modulo the number of classes."""
    bit_depth: int = Field(ge=1, le=8)
    """Number of bits to which pixels are quantized before images are compared."""
    rounding: Literal["floor", "nearest", "truncate"] = "floor"
    """How a continuous pixel is quantized. ``floor``: the inverse of uniform dequantization. ``nearest``: the inverse
    of noise that is centred on a level. ``truncate``: floor((x + 1) / 2 x 255) in fp32, for generated and reference
    images, as in torchmetrics. The images are then half a level too dark, but the published TarFlow numbers were
    measured in this way."""
    clip: Literal[True] = True
    """Clip values to [-1, 1]; there is no other choice."""

    @property
    def events(self) -> str:
        """Description of the data that the protocol can measure."""
        return f"{self.bit_depth}-bit images"

    @model_validator(mode="after")
    def _truncates_bytes(self) -> "_SampledProtocol":
        if self.rounding == "truncate" and self.bit_depth != 8:
            raise ValueError(f"rounding=truncate is for bit_depth=8 (got {self.bit_depth}); use rounding=nearest")
        return self


class FrechetProtocol(_SampledProtocol):
    """Fréchet distance between Gaussians fitted to features of generated images and of all reference images."""

    OMITTED_AT_DEFAULT: ClassVar[frozenset[str]] = frozenset({"images"})
    metric: Literal["frechet"]
    images: Literal["generated", "reconstructed"] = "generated"
    """``generated``: images that a flow draws. ``reconstructed``: images of the split that an autoencoder decodes from
    the means of their latents; ``rounding`` should then be ``nearest``."""
    layer: Literal["pool", "spatial"] = "pool"
    """``pool``: the output of the extractor. ``spatial``: the layer of sFID, the first 7 channels of ``mixed_6/conv``
    in the graph of ADM's evaluator, which torch-fidelity's conversion calls ``Mixed_6d.branch1x1``."""
    estimate: Literal["plain", "infinity"] = "plain"
    """``plain``: the distance for all generated images. ``infinity``: the distance for infinitely many generated
    images, extrapolated in 1 / n (arXiv 1911.07023) from subsets with a fifth of the images up to all of them."""

    @property
    def reconstructs(self) -> bool:
        """Whether the images are reconstructions."""
        return self.images == "reconstructed"

    @model_validator(mode="after")
    def _layer_is_there(self) -> "FrechetProtocol":
        if self.layer == "spatial" and self.extractor != "inception-v3-compat":
            raise ValueError(
                f"layer=spatial needs extractor=inception-v3-compat (got {self.extractor}); use layer=pool"
            )
        return self


class _ReferenceSubset(_SampledProtocol):
    num_reference_images: int = Field(ge=2)
    """Number of reference images. They are a random subset of the data set that depends on ``seed``, or the whole data
    set in order if it has exactly this number of images."""


class KernelProtocol(_ReferenceSubset):
    """Kernel (Inception) distance: unbiased squared MMD with kernel (x . y / D + 1)^3, mean over subsets."""

    metric: Literal["kernel"]
    num_subsets: int = Field(default=100, ge=1)
    subset_size: int = Field(default=1000, ge=2)
    subset_seed: int = Field(default=2020, ge=0, lt=2**32)
    """Seed of the subsets; equal seeds give the same subsets as torch-fidelity."""

    @model_validator(mode="after")
    def _subsets_fit(self) -> "KernelProtocol":
        fewest = min(self.num_images, self.num_reference_images)
        if self.subset_size > fewest:
            raise ValueError(
                f"subset_size must not exceed the smaller of num_images and num_reference_images, {fewest} (got "
                f"{self.subset_size}); lower subset_size"
            )
        return self


class InceptionScoreProtocol(_SampledProtocol):
    """Inception score: exp of the mean of KL(p(y | x) || p(y)) over images x, averaged over ``num_splits`` parts.

    p(y | x) are the class probabilities of image x, and p(y) is their mean over the images of the part.
    """

    higher_is_better: ClassVar[bool] = True
    metric: Literal["inception_score"]
    num_splits: int = Field(default=10, ge=1)
    shuffle_seed: int = Field(default=2020, ge=0, lt=2**32)
    """Seed of the shuffling of images before they are split; equal seeds give the same order as torch-fidelity."""

    @model_validator(mode="after")
    def _fits(self) -> "InceptionScoreProtocol":
        if self.extractor != "inception-v3-compat":
            raise ValueError(
                f"metric=inception_score needs extractor=inception-v3-compat (got {self.extractor}); set extractor"
            )
        if self.num_images < self.num_splits:
            raise ValueError(
                f"num_images must be at least num_splits (got {self.num_images} and {self.num_splits}); raise it"
            )
        return self


class ManifoldProtocol(_ReferenceSubset):
    """Improved precision and recall (arXiv 1904.06991).

    Precision is the share of generated features that lie in the manifold of the reference features. Recall is the share
    of reference features that lie in the manifold of the generated features. The manifold of a set of features is the
    union of balls around them; the radius of a ball is the distance to the k-th nearest neighbour in the set.
    """

    higher_is_better: ClassVar[bool] = True
    metric: Literal["precision", "recall"]
    neighbours: int = Field(default=3, ge=1)
    """Number k of the nearest neighbour that determines the radius of a ball."""

    @model_validator(mode="after")
    def _has_neighbours(self) -> "ManifoldProtocol":
        fewest = min(self.num_images, self.num_reference_images)
        if self.neighbours >= fewest:
            raise ValueError(
                f"neighbours must be below the number of images (got {self.neighbours}, and {fewest} images); lower it"
            )
        return self


SampledProtocol = FrechetProtocol | KernelProtocol | InceptionScoreProtocol | ManifoldProtocol
"""A protocol that measures generated images."""


class Protocol(RootModel[Annotated[PerImageProtocol | SampledProtocol, Field(discriminator="metric")]]):
    """Content of a protocol file, for any metric."""


def load_protocol(path: str, key: str = "metrics.protocols") -> PerImageProtocol | SampledProtocol:
    """Read a protocol file; ``key`` is the configuration key that contains ``path``, for error messages.

    Raises:
        ConfigError: the file cannot be read, or one of its keys is wrong.
    """
    return load_named(Protocol, path, "protocol", key).root


class Requirement(Section):
    """Requirements for one metric of a version."""

    protocol: str
    """Protocol file of the metric."""
    maximum: float | None = None
    """Largest accepted value."""
    minimum: float | None = None
    """Smallest accepted value."""
    minimum_images: int | None = Field(default=None, ge=1)
    """Smallest accepted number of images on which the value was measured."""
    must_beat_champion: bool = False
    """Whether the value must be significantly better than the value of the current champion with the same protocol id.
    For likelihoods, the standard error is computed from the difference between the two versions on each sample. For
    other metrics, it is computed from the standard errors of both values."""
    margin: float = Field(default=0.0, ge=0)
    """Minimum improvement over the value of the champion, in the unit of the metric."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """One-sided confidence of the comparison with the champion."""
    protocol_id: str | None = None
    """Required protocol id, in full. It also determines the reference images; None accepts any reference."""

    @model_validator(mode="after")
    def _asks_something(self) -> "Requirement":
        if not self.must_beat_champion and (self.maximum, self.minimum, self.minimum_images) == (None, None, None):
            raise ValueError(
                "a requirement needs maximum, minimum, minimum_images or must_beat_champion (got none); set one"
            )
        return self


class GateConfig(Section):
    """A gate: the requirements that a version must meet before an alias moves to it."""

    name: Name
    requirements: tuple[Requirement, ...] = Field(min_length=1)
    approvals: tuple[str, ...] = ()
    """Names of users who must have approved the version (``models approve``)."""


def load_gate(path: str, key: str) -> tuple[GateConfig, dict[str, PerImageProtocol | SampledProtocol]]:
    """Read a gate file and the protocol files of its requirements; return the gate and a mapping from path to protocol.

    ``key`` is the configuration key that contains ``path``, for error messages.

    Raises:
        ConfigError: a file cannot be read, or one of its keys is wrong.
    """
    gate = load_named(GateConfig, path, "gate", key)
    return gate, {r.protocol: load_protocol(r.protocol, f"protocol of gate {gate.name}") for r in gate.requirements}
