"""Declaration of a verb: its configuration, function, manual and flags."""

from dataclasses import dataclass
from pathlib import Path

from tarflow_scale.config.base import Root, Section
from tarflow_scale.errors import ConfigError

__all__ = ["Flag", "Verb", "flags_of"]


@dataclass(frozen=True)
class Flag:
    """A flag of a verb. It sets a key of the configuration, or calls another function of the module of the verb.

    Args:
        name: name without the dashes.
        help: description for the manual.
        values: names of the flag's values in the manual; empty for a flag without values.
        key: key of the configuration that is set to the value.
        function: function that is called instead of the function of the verb. Its arguments are the values of the flag,
            and no configuration is read; if the flag has no values, the arguments are those of the verb's function.
    """

    name: str
    help: str
    values: tuple[str, ...] = ()
    key: str | None = None
    function: str | None = None


@dataclass(frozen=True)
class Verb:
    """A verb of the command line.

    Args:
        module: module of the package that contains ``function(configuration, dry_run)``.
        config: root section of the configuration.
        summary: description for the list of verbs.
        example: an example command, which names a file in ``configs/``.
        function: name of the entry function.
        flags: flags in addition to ``--dry-run``. A user may give at most one flag with a function.
        imports: names of packages that are slow to import, for a message before the import.
    """

    module: str
    config: type[Root]
    summary: str
    example: str
    function: str = "run"
    flags: tuple[Flag, ...] = ()
    imports: str = ""

    @property
    def file(self) -> str:
        """Path of the configuration file in the example."""
        return next(word for word in self.example.split() if word.startswith("configs/"))

    def load(self, path: Path | None, overrides: list[str]) -> Root:
        """Read the configuration.

        Raises:
            ConfigError: the configuration is wrong. If a flag can set a missing key, the message names the flag.
        """
        try:
            return self.config.load(path, overrides, self.file)
        except ConfigError as error:
            text = str(error)
            for flag in self.flags:
                text = text.replace(f"as {flag.key}=VALUE", f"with --{flag.name} {' '.join(flag.values)}")
            raise ConfigError(text) from error


def flags_of(section: type[Section], key: str) -> tuple[Flag, ...]:
    """A flag for each key of a section; ``key`` is the path of the section in the configuration."""
    return tuple(
        Flag(name.replace("_", "-"), " ".join((field.description or "").split()), (name.upper(),), f"{key}.{name}")
        for name, field in section.model_fields.items()
    )
