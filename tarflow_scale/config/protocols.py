"""Protocols and gates: the files in ``evals/`` that fix how a number is measured and which numbers promote a model."""

import hashlib
import json
from typing import Annotated, Literal

from pydantic import Field, RootModel, model_validator

from tarflow_scale.config.base import Section, load_config
from tarflow_scale.config.sections import Name

__all__ = ["BitsPerDimProtocol", "FrechetProtocol", "GateConfig", "Protocol", "Requirement", "load_protocol"]


class _Protocol(Section):
    name: Name
    """Name under which the number is reported."""

    @property
    def digest(self) -> str:
        """SHA-256 of the resolved protocol; part of the protocol id."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


class BitsPerDimProtocol(_Protocol):
    """Negative log-likelihood of a whole split under uniform dequantisation, in bits per dimension."""

    metric: Literal["bits_per_dim"]
    bit_depth: int = Field(ge=1, le=8)
    """Levels of a pixel are 2^bit_depth; must be the data set's."""
    num_draws: int = Field(default=1, ge=1)
    """Dequantisation draws per image."""
    estimate: Literal["mean", "importance"] = "mean"
    """``mean`` over draws: an upper bound of the discrete image's cost. ``importance``: log of the mean density, a
    tighter bound, exact in the limit of many draws."""
    seed: int = Field(default=0, ge=0)
    """Seed of the draws."""
    labels: Literal["given", "none"] = "given"
    """``given``: log p(x | y) for a class-conditional flow. ``none``: labels dropped."""


class FrechetProtocol(_Protocol):
    """Fréchet distance between Gaussians fitted to features of generated and of reference images."""

    metric: Literal["frechet"]
    extractor: Literal["pixels", "inception-v3-compat"]
    """``pixels``: the flattened image in levels 0..2^bit_depth-1. ``inception-v3-compat``: torch-fidelity's FID."""
    extractor_sha256: str | None = None
    """Digest of the extractor's weights file, checked before use. None: for ``inception-v3-compat`` the published
    prefix 6726825d is checked; ``pixels`` has no weights."""
    num_images: int = Field(ge=2)
    """Generated images."""
    seed: int = Field(default=0, ge=0)
    """Seed of the latents."""
    labels: Literal["balanced"] = "balanced"
    """Image i has label i modulo the number of classes."""
    bit_depth: int = Field(ge=1, le=8)
    """Images are compared after quantisation to this many bits."""
    rounding: Literal["floor", "nearest"] = "floor"
    """How a continuous pixel becomes a level: ``floor`` is the inverse of uniform dequantisation, ``nearest`` that
    of noise around the level."""
    clip: Literal[True] = True
    """Values outside [-1, 1] are clipped."""


class Protocol(RootModel[Annotated[BitsPerDimProtocol | FrechetProtocol, Field(discriminator="metric")]]):
    """Any protocol file."""


def load_protocol(path: str) -> BitsPerDimProtocol | FrechetProtocol:
    """Read a protocol file.

    Raises:
        ConfigError: when it cannot be read or a key is wrong.
    """
    return load_config(Protocol, path, []).root


class Requirement(Section):
    """One number that a version must show."""

    protocol: str
    """The protocol file; a report by any other protocol does not count."""
    maximum: float | None = None
    """The value must not exceed this."""
    must_beat_champion: bool = False
    """The value must be lower than the current holder's by at least ``margin``, on the same protocol id."""
    margin: float = Field(default=0.0, ge=0)
    """In the unit of the metric."""
    protocol_id: str | None = None
    """The full id that the number must carry, which pins the images too; None accepts any reference."""

    @model_validator(mode="after")
    def _asks_something(self) -> "Requirement":
        if self.maximum is None and not self.must_beat_champion:
            raise ValueError("a requirement needs maximum or must_beat_champion (got neither); set one")
        return self


class GateConfig(Section):
    """What a version must show before an alias moves to it."""

    name: Name
    requirements: tuple[Requirement, ...] = Field(min_length=1)
