"""Commands on a registry: a folder or a bucket, without a server.

Each model has a log of numbered events. An event has a checksum and contains the digest of the event before it.
Versions, reports, aliases and their history are computed from the log; a snapshot avoids reading all of it. Files are
stored under their SHA-256 and verified whenever they are read. Only safetensors and JSON are stored; nothing is
unpickled.

A gate (evals/gates/) guards an alias such as champion: only `promote` moves it to a new version, and `models alias`
raises an error. `rollback` fails if the alias has no earlier version. `retire` fails if the version has an alias.
`export` writes a folder in the Hugging Face layout with a model card.

`init` tests whether exactly one of several writers succeeds in creating the same file. If the store fails the test,
`init` raises an error. command.single_writer=true promises that only one process writes, and skips the test. File
systems without hard links (FAT, CIFS, many FUSE file systems) work if they can rename without replacing a file.
command.shared=group (or all) sets file modes like git's core.sharedRepository; in an existing registry it adds missing
permissions.
"""

from typing import Literal

from pydantic import Field

from tarflow_scale.config.base import Root, Section
from tarflow_scale.config.verb import Verb
from tarflow_scale.config.versions import Name

__all__ = ["VERBS", "BrowseConfig", "CommandConfig", "ModelsConfig"]


class BrowseConfig(Section):
    """The registry, and the model and version that a command works on (verb ``models``)."""

    path: str
    """Folder or URL of the registry."""
    model: Name | None = None
    """Name of a model. Without it, ``list`` shows all models; the other commands require it."""
    version: int | str = "latest"
    """A number, an alias such as ``champion``, or ``latest``; for ``rollback``, the alias to move back."""


class CommandConfig(Section):
    """Other arguments of the commands of ``models``. Each key names the commands that read it."""

    other: int | str | None = None
    """``diff``: the version to compare with; None takes the champion."""
    alias: Name | None = None
    """``alias``: name of the alias to move to the version."""
    reason: str = ""
    """``alias``, ``approve``, ``retire``, ``rollback``, ``import``: the reason, which is stored in the log."""
    path: str | None = None
    """``export``: the folder or URL to write. ``import``: the folder or URL to read."""
    licence: str = "other"
    """``export``: SPDX identifier of the licence, for the model card."""
    samples: bool = True
    """``export``: draw samples for the model card if no report has samples; slow for a large model without a GPU."""
    delete: bool = False
    """``collect``: delete the listed files; by default they are only listed."""
    grace_days: float = Field(default=7.0, ge=0.125)
    """``collect``: how long retired versions, and files that belong to no version, are kept."""
    single_writer: bool = False
    """``init``: promise that only one process writes. Required for a store on which writers
    could replace each other's files."""
    shared: Literal["umask", "group", "all"] = "umask"
    """``init``: who may use the files of a local registry, like git's ``core.sharedRepository``. ``umask``: the umask
    of each writer decides. ``group``: the group of the folder may read and write. ``all``: in addition, all users may
    read."""


class ModelsConfig(Root):
    """A registry, and the arguments of a command on it. Only the commands export and import read weights."""

    registry: BrowseConfig
    command: CommandConfig = CommandConfig()


_COMMANDS = {
    "init": ("commands", "init", "create a registry, after a test of its store with concurrent writers",
        "registry.path=s3://bucket/registry"),
    "list": ("commands", "list_models", "list all versions of all models of a registry", ""),
    "show": ("commands", "show", "show where a version came from, its numbers and its history", "registry.version=2"),
    "diff": ("commands", "diff", "compare settings and numbers of two versions",
        "registry.version=latest command.other=champion"),
    "verify": ("commands", "verify", "check every event and every file of a registry against its digest", ""),
    "alias": ("commands", "alias", "move an unguarded alias to a version", "command.alias=candidate"),
    "approve": ("commands", "approve", "approve a version, for gates that require approvals",
        "registry.version=3"),
    "rollback": ("commands", "rollback", "move an alias back to its previous version", "registry.version=champion"),
    "retire": ("commands", "retire", "take a version out of use", "registry.version=1 command.reason=leak"),
    "collect": ("commands", "collect", "list files that no version needs any more, or remove them",
        "command.grace_days=30 command.delete=true"),
    "export": ("exchange", "export_version",
        "write a version as a folder in the Hugging Face layout, with a model card",
        "command.path=exported command.licence=apache-2.0"),
    "import": ("exchange", "import_version", "register a version from a folder that export wrote",
        "registry.model=copy command.path=exported"),
}  # fmt: skip
"""For each command: module, function, summary, and the overrides of its example."""

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
