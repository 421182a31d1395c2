"""How a configuration is read: one YAML file, ``section.key=value`` overrides, then validation of the whole.

Every problem is reported with the path of its key, before anything heavy is imported or anything is written.
"""

from pathlib import Path
from typing import Any, Self, TypeVar, cast

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from tarflow_scale.errors import ConfigError

__all__ = ["Root", "Section", "load_config", "validated"]

R = TypeVar("R", bound=BaseModel)
_MODEL_KINDS = ("tarflow", "glow", "nice", "realnvp", "maf", "iaf", "continuous")
"""Which pydantic puts into the path of a key below ``model``, though nobody writes them there."""


class Section(BaseModel):
    """Base of every section: frozen, unknown keys refused, NaN and infinity refused, defaults checked."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class Root(Section):
    """Base of every verb's configuration."""

    @classmethod
    def load(cls, path: Path | None, overrides: list[str]) -> Self:
        """Read ``path`` (None: start from nothing), merge the overrides, validate; see `load_config`."""
        return load_config(cls, path, overrides)


def load_config(kind: type[R], path: Path | str | None, overrides: list[str]) -> R:
    """Read, merge and validate.

    Args:
        kind: the root section of the verb.
        path: the YAML file, or None.
        overrides: ``section.key=value``; the value is YAML. They are merged before validation.

    Raises:
        ConfigError: one line for every problem, each with the path of its key.
    """
    raw = _read_yaml(Path(path)) if path else {}
    for override in overrides:
        _merge(raw, override)
    return validated(kind, raw)


def validated(kind: type[R], raw: dict[str, Any]) -> R:
    """The section that ``raw`` describes.

    Raises:
        ConfigError: as `load_config`.
    """
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        lines = [_one_line(problem) for problem in error.errors(include_url=False)]
        raise ConfigError("; ".join(lines)) from error


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path} ({error.strerror}); check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path} is not valid YAML ({reason}); correct it") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold sections (got {type(raw).__name__}); see configs/ for examples")
    return cast(dict[str, Any], raw)


def _merge(raw: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    keys = path.split(".")
    if not separator or not all(keys):
        raise ConfigError(f"an override is section.key=value (got {override!r}); for example training.seed=1")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: the value is not valid YAML (got {text!r}); quote it") from error
    node = raw
    for key in keys[:-1]:
        child = node.setdefault(key, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{path}: {key} is a value, not a section (got {child!r}); check the path of the key")
        node = cast(dict[str, Any], child)
    node[keys[-1]] = value


def _one_line(problem: Any) -> str:
    """``model.patch_size: Input should be greater than or equal to 1 (got 0)``."""
    path = ".".join(str(part) for part in problem["loc"] if part not in _MODEL_KINDS)
    match problem["type"]:
        case "extra_forbidden":
            return f"{path}: unknown key; check the spelling against --help"
        case "union_tag_invalid":
            ctx = problem["ctx"]
            key = ctx["discriminator"].strip("'")
            return f"{path}.{key}: must be one of {ctx['expected_tags']} (got {ctx['tag']!r})".lstrip(".")
        case "union_tag_not_found":
            key = problem["ctx"]["discriminator"].strip("'")
            missing = f"{path}.{key}".lstrip(".")
            return f"{missing}: required key is missing; set it in the YAML or as {missing}=VALUE"
        case "missing":
            return f"{path}: required key is missing; set it in the YAML or as {path}=VALUE"
        case _:
            reason = problem["msg"].removeprefix("Value error, ")
            given = f" (got {problem['input']!r})" if path and "(got" not in reason else ""
            return f"{path}: {reason}{given}" if path else reason
