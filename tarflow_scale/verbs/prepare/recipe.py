"""The digest that identifies a packed data set by its source and configuration; the manifest stores it."""

from tarflow_scale import storage
from tarflow_scale.config.base import Section
from tarflow_scale.config.prepare import PackedShardsConfig, SourceConfig, SplitConfig
from tarflow_scale.records import canonical_json
from tarflow_scale.shards.events import VectorEvent
from tarflow_scale.shards.sources import ImageSource

__all__ = ["recipe_digest"]

_IF_CHANGED = {
    "source": ("label_column", "label_table", "label_names", "image_member", "condition_columns"),
    "split": ("by_name", "train", "validation", "test", "ignore"),
}
"""Settings that enter the digest only if they differ from their defaults, so that older data sets keep their digest."""


def recipe_digest(source: ImageSource, config: SourceConfig, split: SplitConfig, shards: PackedShardsConfig) -> str:
    """SHA-256 of the content of the source and of the settings that affect the bytes of the data set.

    Paths and the number of workers are left out, and so is ``near_duplicates`` unless it drops images.
    """
    of_source = {"path", *_at_default(config, _IF_CHANGED["source"])}
    if isinstance(source.event, VectorEvent):
        of_source -= {"label_column", "condition_columns"}
    if source.reading is None:
        of_source |= {"orientation", "transparency"}
    of_split = _at_default(split, _IF_CHANGED["split"])
    if split.near_duplicates != "drop":
        of_split.add("near_duplicates")
    settings = {
        "source": config.model_dump(mode="json", exclude=of_source),
        "split": split.model_dump(mode="json", exclude=of_split),
        "shards": shards.model_dump(mode="json", exclude={"path", "num_workers"}),
    }
    return storage.digest(canonical_json([settings, source.digest]))


def _at_default(section: Section, names: tuple[str, ...]) -> set[str]:
    return {name for name in names if getattr(section, name) == type(section).model_fields[name].default}
