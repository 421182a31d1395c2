"""Which member of a sample of a WebDataset tar is its image, and which its label.

A sample is a run of members that share a key, the path up to the first dot of the base name; what follows that dot, in
lower case, is the extension. Both are webdataset's rules.
"""

from collections.abc import Callable, Mapping
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
    """Which member of a sample is the image, and which the label.

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

    def image_of(self, extensions: list[str], sample: str) -> str | None:
        """Extension of the image of a sample; None without an image.

        Raises:
            DataError: there are several.
        """
        if self.image is not None:
            return self.image if self.image in extensions else None
        images = [extension for extension in extensions if extension.rpartition(".")[2] in IMAGE_EXTENSIONS]
        if len(images) > 1:
            rule = ", since a key ends at the first dot of a name" if any("." in name for name in images) else ""
            raise DataError(
                f"a sample must have one image (got {' and '.join(images)} for {sample}{rule}); choose one with "
                f"source.image_member={images[0]}{', or rename files with dots in their names' if rule else ''}"
            )
        return images[0] if images else None

    def may_be_label(self, extension: str, earlier: Mapping[str, Any]) -> bool:
        """Whether the content of a member is needed, given the ``earlier`` members of its sample."""
        if self.label is not None:
            return extension in ("json", self.label.lower().lstrip("."))
        return extension.endswith(".cls") or extension == "cls" or (extension == "json" and "cls" not in earlier)

    def label_of(self, extensions: list[str], content: Callable[[str], bytes], sample: str) -> int | str | None:
        """The label of a sample; None without one, and for -1.

        Raises:
            DataError: there are several, or a member for labels has none.
        """
        if self.label is not None:
            member = self.label.lower().lstrip(".")
            if member in extensions:
                return as_label(content(member), sample)
            value = _field(parse_json(content("json"), sample), self.label) if "json" in extensions else None
            return None if value is None else as_label(value, sample)
        labels = ["cls"] if "cls" in extensions else [name for name in extensions if name.endswith(".cls")]
        if len(labels) > 1:
            raise DataError(
                f"a sample must have one label (got {' and '.join(labels)} for {sample}); choose one with "
                f"source.label_column={labels[0]}"
            )
        if labels:
            return as_label(content(labels[0]), sample)
        try:
            record = parse_json(content("json"), sample) if "json" in extensions else None
        except DataError:  # it need not hold labels
            return None
        value = record.get("label") if isinstance(record, dict) else None
        return None if value is None else as_label(value, sample)


def _field(record: Any, name: str) -> Any:
    """Field ``a.b`` of a JSON object: the field of this name, or ``b`` of ``a``; None without."""
    if not isinstance(record, dict):
        return None
    if name in record:
        return record[name]
    first, dot, rest = name.partition(".")
    return _field(record.get(first), rest) if dot else None
