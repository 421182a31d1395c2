"""Commands on a registry."""

from typing import Literal

from pydantic import Field

from tarflow_scale.config.base import Root, Section
from tarflow_scale.config.registry import Name

__all__ = ["BrowseConfig", "CommandConfig", "ModelsConfig"]


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


class ModelsConfig(Root):
    """A registry, and what a command needs; none reads weights into memory as a model."""

    registry: BrowseConfig
    command: CommandConfig = CommandConfig()
