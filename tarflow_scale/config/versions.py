"""The section ``registry``: a registry, a model, a version."""

from typing import Annotated

from pydantic import Field

from tarflow_scale.config.base import Section

__all__ = ["Name", "RegistryConfig", "VersionConfig"]

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
    """A number, an alias such as ``champion``, or ``latest``, the newest version that is not retired. For ``promote``,
    ``latest`` is the newest version that is not retired and has all numbers that the gate requires."""
