"""Read a configuration: parse a YAML file, merge ``section.key=value`` overrides, validate the result.

Every problem is reported with the path of its key, before slow imports and before anything is written. A YAML file is
untrusted input: tags create no objects, the size after expansion of references is limited, and passwords are refused,
because a run stores its configuration.
"""

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar, cast, get_args

import yaml
from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, ValidationError, model_serializer

from tarflow_scale.errors import ConfigError

__all__ = [
    "Root",
    "Section",
    "absent_here",
    "is_there",
    "load_config",
    "load_named",
    "sections_of",
    "validated",
    "where_paths_start",
    "working_folder",
]

R = TypeVar("R", bound=BaseModel)
_PASSWORD = re.compile(r"^[a-z][a-z0-9+.:-]*://[^/\s@]*:[^/\s@]+@")
_MOST_VALUES = 100_000
"""Maximum number of values after YAML references are expanded; a kilobyte of YAML can expand to a billion values."""
_ALIKE = 0.75
"""Minimum similarity between an unknown key and the key that the error message suggests instead."""
_MOST_SHOWN = 300
"""Maximum number of characters of a value in an error message."""
_TOP = Path(__file__).parents[2]
"""Top folder of the checkout, if the package is not installed as a wheel."""
_REPOSITORY = ("configs", "evals", "launch")
_SOURCE = "the source code of tarflow-scale"
_NO_SECTION = re.compile(r"(^|; )\w+: required section is missing")
_OF_MODEL = re.compile(r"\bmodel\.\w+: unknown key")


class _OneLine(type(BaseModel)):
    """Metaclass that reports errors in constructor calls, such as ``GlowConfig(levels=0)``, in one line."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().__call__(*args, **kwargs)
        except ValidationError as error:
            kind = cast(type[BaseModel], cls)
            lines = [_one_line(problem, kind, in_python=True) for problem in error.errors(include_url=False)]
            raise ConfigError("; ".join(f"{cls.__name__}: {line}" for line in lines)) from error


class Section(BaseModel, metaclass=_OneLine):
    """Base class of every section: frozen, validates defaults, refuses unknown keys, NaN and infinity."""

    OMITTED_AT_DEFAULT: ClassVar[frozenset[str]] = frozenset()
    """Fields that are written only if they differ from their defaults, so that configurations that were written before
    these fields existed keep their digests."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @model_serializer(mode="wrap")
    def _written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = handler(self)
        fields = type(self).model_fields
        omitted = {name for name in self.OMITTED_AT_DEFAULT if getattr(self, name) == fields[name].default}
        return {name: value for name, value in written.items() if name not in omitted}


class Root(Section):
    """Base class of the whole configuration of a verb."""

    @classmethod
    def load(cls, path: Path | None, overrides: list[str], example: str = "configs") -> Self:
        """Call `load_config` for this class."""
        return load_config(cls, path, overrides, example)


def load_config(kind: type[R], path: Path | str | None, overrides: list[str], example: str = "configs") -> R:
    """Read a YAML file, merge the overrides and validate.

    Args:
        kind: the root section of the verb.
        path: the YAML file; None uses only the overrides.
        overrides: ``section.key=value``, where the value is YAML. They are merged before validation.
        example: path in the repository that the error message suggests if ``path`` is None and a section is missing.

    Raises:
        ConfigError: the configuration is wrong. The message is one line with all problems and the paths of their keys.
    """
    raw = _read_yaml(Path(path), "the configuration") if path else {}
    for override in overrides:
        _merge(raw, override)
    _check(raw)
    try:
        return validated(kind, raw)
    except ConfigError as error:
        if any(override.startswith("model.kind=") for override in overrides) and _OF_MODEL.search(str(error)):
            cure = "to change the kind, replace the whole section, as in 'model={kind: glow, levels: 3}'"
            raise ConfigError(f"{error}; {cure}") from error
        if path is None and _NO_SECTION.search(str(error)):
            raise ConfigError(
                f"no configuration file was given; pass one, such as {_in_source(example)}; {error}"
            ) from error
        raise


def load_named(kind: type[R], path: str, noun: str, key: str) -> R:
    """Read a YAML file that the configuration names by its path.

    Args:
        kind: section that the file contains.
        path: path of the file, relative to the working folder.
        noun: kind of file for error messages, such as ``protocol``.
        key: key of the configuration that contains the path.

    Raises:
        ConfigError: the file cannot be read or is wrong. The message begins with the key and names the file.
    """
    try:
        raw = _read_yaml(Path(path), f"the {noun} file")
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from error
    try:
        _check(raw)
        return validated(kind, raw)
    except ConfigError as error:
        raise ConfigError(f"{key}: in the {noun} file {path}: {error}") from error


def validated(kind: type[R], raw: dict[str, Any]) -> R:
    """Validate parsed YAML and return the section.

    Raises:
        ConfigError: as in `load_config`.
    """
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        lines = [_one_line(problem, kind) for problem in error.errors(include_url=False)]
        raise ConfigError("; ".join(lines)) from error


def absent_here(text: str) -> str:
    """Advice on where to find the repository folders that ``text`` mentions; empty if they are present."""
    named = sorted({folder for folder in _REPOSITORY if re.search(rf"(?<![\w.-]){folder}/", text)})
    if not named or (_TOP / "configs").is_dir():
        return ""
    folders = " and ".join(f"{folder}/" for folder in named)
    return f"an installed package does not contain {folders}; copy {folders} from {_SOURCE}"


def working_folder() -> str:
    """The current working folder, for messages about relative paths."""
    try:
        return str(Path.cwd())
    except OSError:
        return "a folder that was removed"


def where_paths_start(message: str, config: Root | None) -> str:
    """Advice to append to an error message about a missing relative path: the folder that the path is relative to."""
    if config is None or "relative to" in message:
        return ""
    for path in _paths(config.model_dump()):
        named = re.search(rf"(?<![\w./-]){re.escape(path)}(?![\w-])", message)
        if named and not path.startswith(("/", "~")) and not is_there(path):
            return f"; {path} is relative to {working_folder()}"
    return ""


def is_there(path: str) -> bool:
    """Whether a file or folder exists; ``path`` may be any text."""
    try:
        return Path(path).exists()
    except OSError:  # the text is too long for a name
        return False


def _paths(value: Any) -> Iterator[str]:
    """Yield the local paths in a configuration, which are the strings with a slash that are not URLs."""
    if isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _paths(item)
    elif isinstance(value, str) and "/" in value and "://" not in value:
        yield value


def _in_source(path: str) -> str:
    """Where to find a file or folder of the repository: in the checkout, or else in the source code."""
    return str(_TOP / path) if (_TOP / path).exists() else f"{path} in {_SOURCE}"


def _read_yaml(path: Path, noun: str) -> dict[str, Any]:
    try:
        raw = _parsed(path.read_text(encoding="utf-8"))
    except OSError as error:
        cure = "check the path" if path.is_absolute() else f"check the path, which is relative to {working_folder()}"
        absent = absent_here(str(path))
        raise ConfigError(
            f"cannot read {noun} {path} ({error.strerror}); {cure}{f'; {absent}' if absent else ''}"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path} is not valid YAML ({reason}); correct it") from error
    if not isinstance(raw, dict):
        examples = _in_source("configs")
        raise ConfigError(
            f"{path} must contain sections with keys (got {type(raw).__name__}); see {examples} for examples"
        )
    return cast(dict[str, Any], raw)


def _parsed(text: str) -> Any:
    """Parse YAML.

    Raises:
        YAMLError: the text is not YAML, is nested too deeply, or has a number with thousands of digits.
    """
    try:
        return yaml.safe_load(text)
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error
    except ValueError as error:
        raise yaml.YAMLError(str(error)) from error


def _check(raw: dict[str, Any]) -> None:
    """Check untrusted values.

    Raises:
        ConfigError: there are too many values after expansion of references, a value refers to itself, or a value holds
            a password or a null character.
    """
    known: dict[int, int] = {}
    ancestors: set[int] = set()

    def size(value: Any, path: str) -> int:
        if isinstance(value, str) and _PASSWORD.match(value):
            raise ConfigError(
                f"{path}: a URL must not hold a password, which would be stored with the run (got one for "
                f"{value.rpartition('@')[2]}); set the password in the environment variables or the credentials file "
                f"of the store's client"
            )
        if isinstance(value, str) and "\0" in value:
            raise ConfigError(f"{path}: a value must not hold a null character (got {_shown(value)}); remove it")
        if not isinstance(value, dict | list | tuple):
            return 1
        if id(value) in ancestors:
            raise ConfigError(
                f"{path}: a value must not refer to itself (got an alias inside the value of its own YAML anchor); "
                f"remove the alias"
            )
        if id(value) not in known:
            ancestors.add(id(value))
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            known[id(value)] = 1 + sum(size(item, f"{path}.{key}".lstrip(".")) for key, item in pairs)
            ancestors.remove(id(value))
        if known[id(value)] > _MOST_VALUES:
            raise ConfigError(
                f"{path}: a configuration must not hold more than {_MOST_VALUES:,} values (got more, because of YAML "
                f"references); write the values without references"
            )
        return known[id(value)]

    size(raw, "")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def _merge(raw: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    keys = path.split(".")
    if not separator or not all(keys):
        raise ConfigError(
            f"an override must have the form section.key=value (got {override!r}); for example training.seed=1"
        )
    try:
        value = _parsed(text)
    except yaml.YAMLError as error:
        cure = "quote it" if text.isprintable() else "quote it, and set LC_ALL=C.UTF-8 if letters are shown as codes"
        raise ConfigError(f"{path}: the value is not valid YAML (got {_shown(text)}); {cure}") from error
    node = raw
    for key in keys[:-1]:
        child = node.setdefault(key, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{path}: {key} is a value, not a section (got {child!r}); check the path of the key")
        node = cast(dict[str, Any], child)
    node[keys[-1]] = value


def _keys_below(kind: type[BaseModel]) -> Iterator[str]:
    """Names of all keys of a section and its subsections."""
    for name, field in kind.model_fields.items():
        yield name
        for section in sections_of(field.annotation):
            yield from _keys_below(section)


def sections_of(annotation: Any) -> list[type[BaseModel]]:
    """The section classes in an annotation: none for a plain value, several for a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in get_args(annotation) for section in sections_of(part)]


def _walked(kind: type[BaseModel], loc: tuple[Any, ...]) -> tuple[list[str], list[type[BaseModel]]]:
    """Convert the location of a pydantic error to a path of keys and the section classes at the end of the path.

    A value has no section class, and a union has several. ``loc`` also contains the ``kind`` of a section in a union;
    this is not a key of the path.
    """
    keys, sections = list[str](), [kind]
    for part in loc:
        if len(sections) > 1 and part in {section.model_fields["kind"].default for section in sections}:
            sections = [section for section in sections if section.model_fields["kind"].default == part]
            continue
        keys.append(str(part))
        fields = [field for section in sections if (field := section.model_fields.get(str(part)))]
        sections = sections_of(fields[0].annotation) if fields else []
    return keys, sections


def _first_key(sections: list[type[BaseModel]]) -> str:
    """The key that an error message shows for a missing section: ``kind`` for a union, else the first required key."""
    if len(sections) > 1:
        return "kind"
    keys = sections[0].model_fields
    return next((name for name, field in keys.items() if field.is_required()), next(iter(keys)))


def _one_line(problem: Any, kind: type[BaseModel], in_python: bool = False) -> str:
    """Put a problem on one line, such as ``model.patch_size: Input should be greater than or equal to 1 (got 0)``."""
    keys, sections = _walked(kind, problem["loc"])
    path = ".".join(keys)
    match problem["type"]:
        case "extra_forbidden":
            key = str(problem["loc"][-1])
            alike = difflib.get_close_matches(key, {*_keys_below(kind)} - {key}, 1, _ALIKE)
            meant = f" (did you mean {alike[0]}?)" if alike else ""
            return f"{path}: unknown key{meant}; check the spelling against --help"
        case "union_tag_invalid":
            ctx = problem["ctx"]
            key = ctx["discriminator"].strip("'")
            return f"{path}.{key}: must be one of {ctx['expected_tags']} (got {ctx['tag']!r})".lstrip(".")
        case "union_tag_not_found":
            key = problem["ctx"]["discriminator"].strip("'")
            missing = f"{path}.{key}".lstrip(".")
            return f"{missing}: required key is missing; set it in the YAML or as {missing}=VALUE"
        case "missing" if in_python:
            return f"{path}: required argument is missing; pass {path}=VALUE"
        case "missing" if sections:
            example = f"{path}.{_first_key(sections)}=VALUE"
            return f"{path}: required section is missing; set its keys in the YAML or as {example}"
        case "missing":
            return f"{path}: required key is missing; set it in the YAML or as {path}=VALUE"
        case "tuple_type" if isinstance(problem["input"], str | int | float):
            return f"{path}: must be a list (got {_shown(problem['input'])}); write {path}=[{problem['input']}]"
        case _:
            reason = problem["msg"].removeprefix("Value error, ")
            given = f" (got {_shown(problem['input'])})" if path and "(got" not in reason else ""
            return f"{path}: {reason}{given}" if path else reason
