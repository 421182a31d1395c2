"""The manual ``VERB --help``: every key with its default and its meaning, from the docstrings of the sections."""

import inspect
from typing import Any, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from tarflow_scale.config.base import sections_of

__all__ = ["keys_of"]


def keys_of(root: type[BaseModel]) -> list[str]:
    """Lines that describe every key of the configuration of a verb."""
    lines: list[str] = []
    for name, field in root.model_fields.items():
        lines += ["", *_describe(name, field)]
    return lines


def _describe(path: str, field: FieldInfo, required: str = "required") -> list[str]:
    sections = [] if get_origin(field.annotation) is tuple else sections_of(field.annotation)
    # An optional union is a section of another verb; the manual of that verb describes it.
    if len(sections) == 1 or (sections and field.is_required()):
        return _describe_sections(path, field, sections, required)
    text = " ".join((field.description or "").split())
    return [f"  {path} ({required if field.is_required() else _default(field)})", *([f"      {text}"] if text else [])]


def _describe_sections(path: str, field: FieldInfo, sections: list[type[BaseModel]], required: str) -> list[str]:
    """Describe a section, or a union of sections: first the keys that all kinds have, then the keys of each kind."""
    if not field.is_required() and field.default is None:
        required = f"required with {path}"
    first, is_union = sections[0], len(sections) > 1
    shared = [name for name in first.model_fields if is_union and _is_shared(name, sections)]
    indent = "  " if "." in path else ""
    kinds = "One of the kinds below; `kind` is required. The keys that most kinds have come first."
    lines = [f"{indent}{path}:  {kinds}"] if is_union else []
    for name in shared:
        lines += _describe(f"{path}.{name}", first.model_fields[name], required)
    for section in sections:
        own = " ".join((field.description or "").split())
        summary, *rest = _paragraphs(f"{own} {section.__doc__ or ''}".strip())
        kind = f".kind={section.model_fields['kind'].default}" if is_union else ""
        without = [name for name in shared if name not in section.model_fields]
        lacking = f" Has no {', '.join(without)}." if without else ""
        lines += [f"{indent}{path}{kind}:  {summary}{lacking}", *rest]
        for name, inner in section.model_fields.items():
            if name not in shared and not (is_union and name == "kind"):
                lines += _describe(f"{path}.{name}", inner, required)
    return lines


def _is_shared(name: str, sections: list[type[BaseModel]]) -> bool:
    """Whether more than half of the sections have this key, all with the same type, default and meaning."""
    fields = [repr(section.model_fields[name]) for section in sections if name in section.model_fields]
    return len(set(fields)) == 1 and 2 * len(fields) > len(sections)


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    return "none" if value is PydanticUndefined else _in_yaml(value)


def _in_yaml(value: Any) -> str:
    """Format a value as it is written in a configuration."""
    match value:
        case None:
            return "none"
        case bool():
            return str(value).lower()
        case tuple():
            return f"[{', '.join(_in_yaml(item) for item in value)}]"
        case _:
            return str(value)


def _paragraphs(text: str) -> list[str]:
    """Join each paragraph into one line; a table keeps its lines, except the horizontal rules."""
    lines: list[str] = []
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        if paragraph.startswith("="):
            lines += [f"    {line}" for line in paragraph.splitlines() if set(line) != {"=", " "}]
        else:
            lines.append(" ".join(paragraph.split()))
    return lines
