"""Configuration of the verb ``promote``."""

import re

from pydantic import field_validator, model_validator

from tarflow_scale.config.base import Root, Section
from tarflow_scale.config.verb import Flag, Verb
from tarflow_scale.config.versions import Name, VersionConfig

__all__ = ["VERB", "GateRef", "PromoteConfig"]


class GateRef(Section):
    """The gate that decides, and the alias that it guards."""

    path: str
    """Gate file; see ``evals/gates/``."""
    alias: Name = "champion"
    """The alias that moves to the version if the gate accepts it."""
    against: str | None = None
    """A version of another model in the registry, such as ``other-model@champion``, that the promoted version must also
    beat in each requirement with ``must_beat_champion``. Both versions must be trained on the same data set and have
    values with the same protocol ids. The other version must exist, and its aliases do not move."""
    reason: str = ""
    """Why the version is promoted; stored in the log."""
    override: str | None = None
    """A reason to promote the version even if the gate refuses it. The decision and the reason are stored. The flag
    ``--override`` sets this key."""

    @field_validator("against")
    @classmethod
    def _names_a_version(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}@[A-Za-z0-9][A-Za-z0-9._-]*", value):
            raise ValueError(f"against must be MODEL@VERSION (got {value!r}); for example other-model@champion")
        return value

    @model_validator(mode="after")
    def _says_what_it_must(self) -> "GateRef":
        if self.alias == "latest" or self.alias.isdigit():
            raise ValueError(
                f"alias must be a name, not a number or latest (got {self.alias}); for example, use champion"
            )
        if self.override is not None and not self.override.strip():
            raise ValueError(
                "override must be a reason (got an empty text); write why the version is promoted, which is stored"
            )
        return self


class PromoteConfig(Root):
    """Check a version against the requirements of a gate, and move the alias to it if it meets all of them."""

    registry: VersionConfig
    gate: GateRef


VERB = Verb(
    "verbs.promote",
    PromoteConfig,
    "let a gate decide whether an alias moves to a version",
    "tarflow-scale promote configs/promote/digits.yaml 'gate.reason=longer training'",
    flags=(
        Flag(
            "override",
            "promote even if the gate refuses; the decision and the reason are stored",
            ("REASON",),
            "gate.override",
        ),
    ),
)
