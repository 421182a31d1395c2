"""The manifest, which makes a folder of tars a data set. It is written last; without it there is no data set."""

from pydantic import Field

from tarflow_scale import storage
from tarflow_scale.config.data import ImageSize
from tarflow_scale.errors import DataError
from tarflow_scale.records import DataSetFacts, FileRecord, LatentFacts, Record, VectorFacts, canonical_json
from tarflow_scale.shards.events import EventType, event_of
from tarflow_scale.shards.images import Reading

__all__ = ["AS_FOUND", "MANIFEST_NAME", "Manifest", "ShardRecord", "index_name", "read_manifest"]

MANIFEST_NAME = "manifest.json"
AS_FOUND = "as found"
"""Value of `Manifest.codec` for tars that another program wrote and that were indexed in place."""


class ShardRecord(FileRecord):
    """A tar of samples, and the digest of the index beside it."""

    file: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\.tar$")
    samples: int = Field(ge=1)
    index_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Manifest(Record):
    """A data set on disk.

    Packed tars contain samples in the order of their keys. The members of a sample are ``{key}.png`` (8-bit image; or
    ``.webp``, ``.jpg``, ``.npy``), ``{key}.cls`` (label, if there are classes) and ``{key}.json`` (metadata, such as
    the origin). `tarflow_scale.shards.events` describes the members for vectors.
    """

    name: str
    split: str
    image_size_pixels: ImageSize
    num_channels: int = Field(ge=1)
    class_names: tuple[str, ...]
    """Empty for a data set without labels."""
    bit_depth: int = Field(ge=1, le=8)
    """Pixels are stored as uint8; only their ``bit_depth`` high bits are data."""
    codec: str = "png"
    """Codec of the images (see `CODECS`); ``npy`` for vectors, and `AS_FOUND` for tars that were indexed in place."""
    source: str
    """Where the images came from, in words."""
    recipe: str
    """Digest of the configuration, or of the indexed tars. A data set with an equal digest is not packed again."""
    shards: tuple[ShardRecord, ...] = Field(min_length=1)
    vectors: VectorFacts | None = None
    """Lengths of vectors and conditions; None for others. A vector of length D counts as a pixel of D channels."""
    latents: LatentFacts | None = None
    """Description of the latents, if the samples are latents of an autoencoder; else None."""
    reading: Reading | None = None
    """How image files were converted to pixels; None if the source had no image files."""

    dropped_copies: int | None = Field(default=None, ge=0)
    """Number of images that were left out as copies or near copies of others; None if near copies were kept."""

    def to_json(self) -> bytes:
        """Canonical JSON without the optional fields that are None, so that adding a field does not change digests."""
        absent = {name for name in ("vectors", "latents", "reading", "dropped_copies") if getattr(self, name) is None}
        return canonical_json(self.model_dump(mode="json", exclude=absent))

    @property
    def num_images(self) -> int:
        """Number of samples in all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 if there are no labels."""
        return len(self.class_names)

    @property
    def event(self) -> EventType:
        """Type of the samples."""
        return event_of(self, self.bit_depth)

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest. The manifest has the digests of all files, so this identifies the whole data set."""
        return storage.digest(self.to_json())

    def facts(self) -> DataSetFacts:
        """The facts that a model version records about its training data."""
        return DataSetFacts(
            name=self.name,
            split=self.split,
            digest=self.digest,
            image_size_pixels=self.image_size_pixels,
            num_channels=self.num_channels,
            class_names=self.class_names,
            num_images=self.num_images,
            vectors=self.vectors,
            latents=self.latents,
        )


def index_name(tar_name: str) -> str:
    """Name of the index of a tar: ``train-00000.tar`` -> ``train-00000.index.npz``."""
    return tar_name.removesuffix(".tar") + ".index.npz"


def read_manifest(path: str) -> Manifest:
    """Read the manifest of the data set at ``path``.

    Raises:
        DataError: there is no manifest, for example because the data set is incomplete.
    """
    location = storage.join(path, MANIFEST_NAME)
    if not storage.exists(location):
        parts = [storage.join(path, split) for split in ("train", "test")]
        packed = [part for part in parts if storage.exists(storage.join(part, MANIFEST_NAME))]
        cure = (
            f"use {' or '.join(packed)} instead"
            if packed
            else "run 'tarflow-scale prepare', or run it again if it was interrupted"
        )
        raise DataError(f"{path} is not a data set (no {MANIFEST_NAME}); {cure}")
    return Manifest.from_json(storage.read_bytes(location), location, DataError)
