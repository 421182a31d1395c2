"""The manifest: what makes a folder of tars a data set. Written last; no manifest, no data set."""

from pydantic import Field

from tarflow_scale import storage
from tarflow_scale.errors import DataError
from tarflow_scale.records import DataSetFacts, FileRecord, Record, VectorFacts, canonical_json
from tarflow_scale.shards.images import Reading
from tarflow_scale.shards.vectors import bytes_shape

__all__ = ["AS_FOUND", "MANIFEST_NAME", "Manifest", "ShardRecord", "index_name", "read_manifest"]

MANIFEST_NAME = "manifest.json"
AS_FOUND = "as found"
"""Codec of tars that others wrote and that were indexed where they are."""


class ShardRecord(FileRecord):
    """One tar of samples, and the digest of the index beside it."""

    file: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\.tar$")
    samples: int = Field(ge=1)
    index_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Manifest(Record):
    """A data set on disk.

    Members of every tar, sample after sample, keys sorted: ``{key}.png`` (8-bit image; or ``.webp .jpg .npy``),
    ``{key}.cls`` (label, where there are classes), ``{key}.json`` (facts about the sample). Vectors: see
    `tarflow_scale.shards.vectors`.
    """

    name: str
    split: str
    image_size_pixels: int = Field(ge=1)
    num_channels: int = Field(ge=1)
    class_names: tuple[str, ...]
    """Empty for a data set without labels."""
    bit_depth: int = Field(ge=1, le=8)
    """Pixels are stored as uint8; their ``bit_depth`` high bits are the data."""
    codec: str = "png"
    """How images are stored; all but jpeg without loss."""
    source: str
    """Where the images came from, in words."""
    recipe: str
    """SHA-256 of the configuration that made it; the same command again has nothing to do."""
    shards: tuple[ShardRecord, ...] = Field(min_length=1)
    vectors: VectorFacts | None = None
    """Of vectors, which have their length for channels and one pixel; None for images."""
    reading: Reading | None = None
    """How image files became pixels; None where the source had no files, and in data sets of earlier versions."""

    dropped_copies: int | None = Field(default=None, ge=0)
    """Images that were left out because they are like others, equal or nearly; None where all were kept."""

    def to_json(self) -> bytes:
        """Canonical JSON; what a data set does not have is left out, so that digests of earlier versions hold."""
        absent = {name for name in ("vectors", "reading", "dropped_copies") if getattr(self, name) is None}
        return canonical_json(self.model_dump(mode="json", exclude=absent))

    @property
    def num_images(self) -> int:
        """Samples over all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 without labels."""
        return len(self.class_names)

    @property
    def event_shape(self) -> tuple[int, ...]:
        """``(C, H, W)`` of an image, ``(D,)`` of a vector."""
        return self.facts().event_shape

    @property
    def stored_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of what loaders carry: an image, or the bytes of a vector."""
        if self.vectors is not None:
            return bytes_shape(self.vectors)
        return (self.num_channels, self.image_size_pixels, self.image_size_pixels)

    @property
    def num_conditions(self) -> int | None:
        """Numbers that each sample is given with; None without any."""
        return (self.vectors.num_conditions if self.vectors else 0) or None

    @property
    def samples_in_words(self) -> str:
        """``1x8x8 images, 4 bit`` or ``vectors of 2``."""
        if self.vectors is None:
            return f"{'x'.join(map(str, self.event_shape))} images, {self.bit_depth} bit"
        given = f", given {self.vectors.num_conditions} numbers" if self.vectors.num_conditions else ""
        return f"vectors of {self.vectors.num_values}{given}"

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest, hence of every byte of the data set."""
        return storage.digest(self.to_json())

    def facts(self) -> DataSetFacts:
        """What a model version keeps of the data it was trained on."""
        return DataSetFacts(
            name=self.name,
            split=self.split,
            digest=self.digest,
            image_size_pixels=self.image_size_pixels,
            num_channels=self.num_channels,
            class_names=self.class_names,
            num_images=self.num_images,
            vectors=self.vectors,
        )


def index_name(tar_name: str) -> str:
    """``train-00000.tar`` -> ``train-00000.index.npz``."""
    return tar_name.removesuffix(".tar") + ".index.npz"


def read_manifest(path: str) -> Manifest:
    """The manifest of the data set at ``path``.

    Raises:
        DataError: when there is none, so that a half-written data set is not one.
    """
    location = storage.join(path, MANIFEST_NAME)
    if not storage.exists(location):
        parts = [storage.join(path, split) for split in ("train", "test")]
        there = [part for part in parts if storage.exists(storage.join(part, MANIFEST_NAME))]
        cure = "run 'tarflow-scale prepare', or again if it was interrupted"
        if there:
            cure = f"name {' or '.join(there)}"
        raise DataError(f"{path} is not a data set (no {MANIFEST_NAME}); {cure}")
    return Manifest.from_json(storage.read_bytes(location), location, DataError)
