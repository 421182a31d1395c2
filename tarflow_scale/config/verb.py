"""How a verb is declared, beside its configuration: where it is, its manual, and its flags."""

from dataclasses import dataclass

from tarflow_scale.config.base import Root, Section

__all__ = ["Flag", "Verb", "flags_of"]


@dataclass(frozen=True)
class Flag:
    """A flag that sets a key, or that has another function of the verb's module called.

    Args:
        name: without the dashes.
        help: what it does.
        values: names of its values in the manual; none for a switch.
        key: the key that it sets to its value.
        function: what is called in place of the verb's own function. A switch's is called with the configuration; one
            with values is called with them, and reads no configuration.
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
        module: below the package; ``function(configuration, dry_run)`` is in it.
        config: what it reads.
        summary: what it does, for the list of verbs.
        example: a command, which names a file in ``configs/``.
        function: its entry.
        flags: beside ``--dry-run``. Of those with a function, one may be given.
        imports: what takes seconds to import, to be announced.
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


def flags_of(section: type[Section], key: str) -> tuple[Flag, ...]:
    """A flag for each key of a section, which is named ``key`` in the configuration."""
    return tuple(
        Flag(name.replace("_", "-"), " ".join((field.description or "").split()), (name.upper(),), f"{key}.{name}")
        for name, field in section.model_fields.items()
    )
