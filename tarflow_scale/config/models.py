"""Commands on a registry: a folder or a bucket, without a server.

Each model has a log of numbered events. An event is claimed by create-if-absent, carries a checksum, and names the
digest of the event before it. Versions, reports, aliases and their history follow from the log; a snapshot avoids
reading all of it. Files are stored under their SHA-256 and verified whenever they are read. Only safetensors and JSON
are stored, and nothing is unpickled.

A gate (evals/gates/) guards an alias such as champion: `promote` moves it, and `models alias` refuses to. `rollback`
and `retire` are refused, with the reason, where there is no other version. An exported version is a folder in the
Hugging Face layout with a model card.

`init` tests the store. It refuses a store without create-if-absent unless command.single_writer=true promises that only
one process writes. File systems without hard links (FAT, CIFS, many of FUSE) work if they can rename without replacing.
command.shared=group (or all: others may read) works as git's core.sharedRepository; on an existing registry it adds
the missing modes.
"""

from typing import Literal

from pydantic import Field

from tarflow_scale.config.base import Root, Section
from tarflow_scale.config.verb import Verb
from tarflow_scale.config.versions import Name

__all__ = ["VERBS", "BrowseConfig", "CommandConfig", "ModelsConfig"]


class BrowseConfig(Section):
    """A registry to look at (verb ``models``)."""

    path: str
    """Folder or URL of the registry."""
    model: Name | None = None
    """Name of a model; ``list`` shows all models without it, the other commands need it."""
    version: int | str = "latest"
    """A number, an alias such as ``champion``, or ``latest``; for ``rollback`` the alias."""


class CommandConfig(Section):
    """What commands of the verb ``models`` need besides a version."""

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
    """``export``: draw samples for the model card if no report has any; slow for a large model without a GPU."""
    delete: bool = False
    """``collect``: remove what is listed; without it, it is only listed."""
    grace_days: float = Field(default=7.0, ge=0.125)
    """``collect``: retired versions, and files that no event ever named, are kept for this long."""
    single_writer: bool = False
    """``init``: promise that only one process writes, for stores without create-if-absent."""
    shared: Literal["umask", "group", "all"] = "umask"
    """``init``: who may use the files of a local registry, whatever the umask of their writer, as git's
    ``core.sharedRepository``. ``umask``: the umask decides. ``group``: the group of the folder may read and write.
    ``all``: so may the group, and all others may read. On an existing registry it also adds missing modes."""


class ModelsConfig(Root):
    """A registry, and the arguments of a command on it. Only the commands export and import read weights."""

    registry: BrowseConfig
    command: CommandConfig = CommandConfig()


_COMMANDS = {
    "init": ("commands", "init", "make a registry, after a test that one of many concurrent writers wins",
        "registry.path=s3://bucket/registry"),
    "list": ("commands", "list_models", "list all versions of all models of a registry", ""),
    "show": ("commands", "show", "show where a version came from, its numbers and its history", "registry.version=2"),
    "diff": ("commands", "diff", "compare settings and numbers of two versions",
        "registry.version=latest command.other=champion"),
    "verify": ("commands", "verify", "check every event and every file of a registry against its digest", ""),
    "alias": ("commands", "alias", "point an alias that no gate guards to a version", "command.alias=candidate"),
    "approve": ("commands", "approve", "approve a version, for gates that require approvals",
        "registry.version=3"),
    "rollback": ("commands", "rollback", "point an alias back to the version before", "registry.version=champion"),
    "retire": ("commands", "retire", "take a version out of use", "registry.version=1 command.reason=leak"),
    "collect": ("commands", "collect", "list files that no version needs any more, or remove them",
        "command.grace_days=30 command.delete=true"),
    "export": ("exchange", "export_version",
        "write a version as a folder in the Hugging Face layout, with a model card",
        "command.path=exported command.licence=apache-2.0"),
    "import": ("exchange", "import_version", "register a version from a folder that export wrote",
        "registry.model=copy command.path=exported"),
}  # fmt: skip
"""Module, function, summary and overrides of the example."""

VERBS = {
    name: Verb(
        f"verbs.models.{module}",
        ModelsConfig,
        summary,
        f"tarflow-scale models {name} configs/models/digits.yaml {overrides}".rstrip(),
        function,
    )
    for name, (module, function, summary, overrides) in _COMMANDS.items()
}
