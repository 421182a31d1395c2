"""What of a sample of a WebDataset tar is its image and what its label.

A sample is a run of members that share a key, the path up to the first dot of the base name; what follows that dot, in
lower case, is the extension. Both are webdataset's rules.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tarflow_scale.config.prepare import SourceConfig
from tarflow_scale.errors import DataError
from tarflow_scale.shards.images import IMAGE_EXTENSIONS
from tarflow_scale.shards.sources.classes import as_label, parse_json

__all__ = ["Rules", "key_and_extension"]


def key_and_extension(name: str) -> tuple[str, str] | None:
    """Key and extension of a member by webdataset's rule; None for a name without an extension, which has neither."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    return (f"{folder}{slash}{stem}", extension.lower()) if stem and dot else None


@dataclass(frozen=True)
class Rules:
    """What of a sample is the image and what the label.

    Args:
        image: extension of the member that is the image; None takes the only one that is an image.
        label: extension of the member that is the label, or field of the ``json``; None takes the usual ones.
    """

    image: str | None = None
    label: str | None = None

    @classmethod
    def of(cls, config: SourceConfig) -> "Rules":
        """The rules of a configuration."""
        image = config.image_member.lower().lstrip(".") if config.image_member else None
        return cls(image, config.label_column)

    def image_of(self, extensions: list[str], what: str) -> str | None:
        """Extension of the image of a sample; None without an image.

        Raises:
            DataError: there are several.
        """
        if self.image is not None:
            return self.image if self.image in extensions else None
        found = [extension for extension in extensions if extension.rpartition(".")[2] in IMAGE_EXTENSIONS]
        if len(found) > 1:
            rule = ", since a key ends at the first dot of a name" if any("." in one for one in found) else ""
            raise DataError(
                f"a sample must have one image (got {' and '.join(found)} for {what}{rule}); choose one with "
                f"source.image_member={found[0]}{', or rename files with dots in their names' if rule else ''}"
            )
        return found[0] if found else None

    def may_be_label(self, extension: str, others: dict[str, Any]) -> bool:
        """Whether the content of a member is needed, given the members of the sample that stand before it."""
        if self.label is not None:
            return extension in ("json", self.label.lower().lstrip("."))
        return extension.endswith(".cls") or extension == "cls" or (extension == "json" and "cls" not in others)

    def label_of(self, extensions: list[str], content: Callable[[str], bytes], what: str) -> int | str | None:
        """The label of a sample; None without one, and for -1.

        Raises:
            DataError: there are several, or what stands for a label is none.
        """
        if self.label is not None:
            member = self.label.lower().lstrip(".")
            if member in extensions:
                return as_label(content(member), what)
            found = _field(parse_json(content("json"), what), self.label) if "json" in extensions else None
            return None if found is None else as_label(found, what)
        found = [one for one in extensions if one == "cls"] or [one for one in extensions if one.endswith(".cls")]
        if len(found) > 1:
            raise DataError(
                f"a sample must have one label (got {' and '.join(found)} for {what}); choose one with "
                f"source.label_column={found[0]}"
            )
        if found:
            return as_label(content(found[0]), what)
        try:
            label = parse_json(content("json"), what) if "json" in extensions else None
        except DataError:  # nobody said that it holds labels
            return None
        label = label.get("label") if isinstance(label, dict) else None
        return None if label is None else as_label(label, what)


def _field(found: Any, name: str) -> Any:
    """Field ``a.b`` of a JSON object: the one that is called so, or ``b`` of ``a``; None without."""
    if not isinstance(found, dict):
        return None
    if name in found:
        return found[name]
    first, dot, rest = name.partition(".")
    return _field(found.get(first), rest) if dot else None
