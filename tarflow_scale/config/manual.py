"""The manual of a verb, ``VERB --help``: every key with its default and meaning, from the docstrings of sections."""

import inspect
from typing import Any, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from tarflow_scale.config.base import sections_of

__all__ = ["keys_of"]


def keys_of(root: type[BaseModel]) -> list[str]:
    """Lines on every key of a verb's configuration."""
    lines: list[str] = []
    for name, field in root.model_fields.items():
        lines += ["", *_describe(name, field)]
    return lines


def _describe(path: str, field: FieldInfo, required: str = "required") -> list[str]:
    sections = [] if get_origin(field.annotation) is tuple else sections_of(field.annotation)
    # Kinds that may be left out belong to another verb, whose manual has them.
    if len(sections) == 1 or (sections and field.is_required()):
        return _describe_sections(path, field, sections, required)
    text = " ".join((field.description or "").split())
    return [f"  {path} ({required if field.is_required() else _default(field)})", *([f"      {text}"] if text else [])]


def _describe_sections(path: str, field: FieldInfo, sections: list[type[BaseModel]], required: str) -> list[str]:
    """One section, or several of which ``kind`` chooses one: what they share first, then what each has of its own."""
    if not field.is_required() and field.default is None:
        required = f"required with {path}"
    first, *others = sections
    shared = [name for name in first.model_fields if others and all(_same(name, first, one) for one in others)]
    indent = "  " if "." in path else ""
    kinds = "One of the kinds below, which `kind` names; it must be written. First the keys that all of them have."
    lines = [f"{indent}{path}:  {kinds}"] if others else []
    for name in shared:
        lines += _describe(f"{path}.{name}", first.model_fields[name], required)
    for section in sections:
        own = " ".join((field.description or "").split())
        summary, *rest = _paragraphs(f"{own} {section.__doc__ or ''}".strip())
        kind = f".kind={section.model_fields['kind'].default}" if others else ""
        lines += [f"{indent}{path}{kind}:  {summary}", *rest]
        for name, inner in section.model_fields.items():
            if name not in shared and not (others and name == "kind"):
                lines += _describe(f"{path}.{name}", inner, required)
    return lines


def _same(name: str, one: type[BaseModel], other: type[BaseModel]) -> bool:
    fields = [section.model_fields.get(name) for section in (one, other)]
    return repr(fields[0]) == repr(fields[1])


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    return "none" if value is PydanticUndefined else _in_yaml(value)


def _in_yaml(value: Any) -> str:
    """As one writes it in a configuration."""
    match value:
        case None:
            return "none"
        case bool():
            return str(value).lower()
        case tuple():
            return f"[{', '.join(_in_yaml(one) for one in value)}]"
        case _:
            return str(value)


def _paragraphs(text: str) -> list[str]:
    """Each on one line, but tables as they are, without their rules."""
    found: list[str] = []
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        if paragraph.startswith("="):
            found += [f"    {line}" for line in paragraph.splitlines() if set(line) != {"=", " "}]
        else:
            found.append(" ".join(paragraph.split()))
    return found
