"""Rules that choose the image and the label among the members of a sample in a WebDataset tar.

A sample consists of consecutive members that share a key. The key is the path up to the first dot of the file name; the
extension is the text after that dot, in lower case. Both rules are the same as in webdataset.
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
    """Key and extension of a member; None for a name without an extension, which belongs to no sample."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    return (f"{folder}{slash}{stem}", extension.lower()) if stem and dot else None


@dataclass(frozen=True)
class Rules:
    """The settings that choose the image and the label of a sample.

    Args:
        image: extension of the image member; None chooses the only member with an image extension.
        label: extension of the label member, or a field of the ``json`` member; None tries ``cls``, then
            ``*.cls``, then the field ``label`` of the ``json`` member.
    """

    image: str | None = None
    label: str | None = None

    @classmethod
    def of(cls, config: SourceConfig) -> "Rules":
        """The rules that a configuration sets."""
        image = config.image_member.lower().lstrip(".") if config.image_member else None
        return cls(image, config.label_column)

    def image_of(self, extensions: list[str], sample: str) -> str | None:
        """Extension of the image of a sample; None if the sample has no image.

        Raises:
            DataError: the sample has more than one image.
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
        """Whether a member may contain the label, so that it must be read.

        Args:
            extension: extension of the member.
            earlier: the earlier members of the sample, by extension.
        """
        if self.label is not None:
            return extension in ("json", self.label.lower().lstrip("."))
        return extension.endswith(".cls") or extension == "cls" or (extension == "json" and "cls" not in earlier)

    def label_of(self, extensions: list[str], content: Callable[[str], bytes], sample: str) -> int | str | None:
        """The label of a sample; None if it has no label, or the label is -1.

        Args:
            extensions: extensions of the members.
            content: returns the content of a member by extension.
            sample: name of the sample, for messages.

        Raises:
            DataError: the sample has more than one label member, or the label is not a number or text.
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
        except DataError:  # a .json that no setting names need not be JSON
            return None
        value = record.get("label") if isinstance(record, dict) else None
        return None if value is None else as_label(value, sample)


def _field(record: Any, name: str) -> Any:
    """Value of a field of a JSON object, or None; ``a.b`` is the field ``a.b``, or else the field ``b`` of ``a``."""
    if not isinstance(record, dict):
        return None
    if name in record:
        return record[name]
    first, dot, rest = name.partition(".")
    return _field(record.get(first), rest) if dot else None
