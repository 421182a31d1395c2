"""Declaration of a verb beside its configuration: its function, manual and flags."""

from dataclasses import dataclass
from pathlib import Path

from tarflow_scale.config.base import Root, Section
from tarflow_scale.errors import ConfigError

__all__ = ["Flag", "Verb", "flags_of"]


@dataclass(frozen=True)
class Flag:
    """A flag that sets a key, or that calls another function of the module of the verb.

    Args:
        name: name without the dashes.
        help: what the flag does.
        values: names of its values in the manual; none for a switch.
        key: key of the configuration that is set to the value.
        function: function that is called instead of that of the verb. For a switch it is called with the configuration;
            for a flag with values it is called with these, and no configuration is read.
    """

    name: str
    help: str
    values: tuple[str, ...] = ()
    key: str | None = None
    function: str | None = None


@dataclass(frozen=True)
class Verb:
    """A verb.

    Args:
        module: module below the package, which has ``function(configuration, dry_run)``.
        config: root section of its configuration.
        summary: what it does, for the list of verbs.
        example: an example command, which names a file in ``configs/``.
        function: entry function.
        flags: flags in addition to ``--dry-run``. At most one flag with a function may be given.
        imports: slow imports, to be announced.
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
        """The configuration of the example."""
        return next(word for word in self.example.split() if word.startswith("configs/"))

    def load(self, path: Path | None, overrides: list[str]) -> Root:
        """The configuration.

        Raises:
            ConfigError: one line for every problem; where a key is missing that a flag sets, it names the flag.
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
