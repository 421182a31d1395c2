"""Samples to shards: reproducible tars through webdataset, an index beside each, the manifest last."""

import io
import json
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from webdataset.writer import TarWriter

from tarflow_scale import storage
from tarflow_scale.shards.images import CODECS, Codec, encode_image
from tarflow_scale.shards.index import ShardIndex, checksum
from tarflow_scale.shards.manifest import MANIFEST_NAME, Manifest, ShardRecord, index_name

__all__ = ["PackedShard", "Sample", "pack_shard", "publish_manifest"]

_MODIFIED_SECONDS = 0
"""Time stamp of every member: equal samples give equal bytes. An integer, because a float needs pax headers."""

_SHORT_NAME = 90
"""A key that is shorter fits, with its extension, into the name of an old tar header."""


@dataclass(frozen=True)
class Sample:
    """One image ``(C, H, W)`` uint8 with its label and facts."""

    key: str
    image: NDArray[np.uint8]
    label: int | None
    facts: dict[str, Any] = field(default_factory=dict)


def pack_shard(samples: Iterable[Sample], codec: Codec = "png", quality: int = 95) -> tuple[bytes, ShardIndex]:
    """Tar and index of a shard; the same samples give the same bytes."""
    buffer = io.BytesIO()
    offsets = [0]
    writer = TarWriter(buffer, mtime=_MODIFIED_SECONDS, encoder=False)
    try:
        for sample in samples:
            members: dict[str, Any] = {"__key__": sample.key, CODECS[codec]: encode_image(sample.image, codec, quality)}
            if sample.label is not None:
                members["cls"] = str(sample.label).encode()
            members["json"] = json.dumps(sample.facts, sort_keys=True).encode()
            # the same bytes in half the time, where no field needs the longer form
            short = len(sample.key) < _SHORT_NAME and sample.key.isascii()
            writer.tarstream.format = tarfile.USTAR_FORMAT if short else tarfile.PAX_FORMAT
            writer.write(members)
            offsets.append(writer.tarstream.offset)  # the stream buffers, so the position of the file lags behind
    finally:
        writer.close()
    content = buffer.getvalue()
    view = memoryview(content)
    checksums = [checksum(view[start:stop]) for start, stop in pairwise(offsets)]
    return content, ShardIndex(np.array(offsets, dtype=np.int64), np.array(checksums, dtype=np.uint64))


@dataclass(frozen=True)
class PackedShard:
    """A shard in memory: tar, index, and the record that describes both."""

    tar: bytes
    index: bytes
    record: ShardRecord

    @classmethod
    def of(cls, tar_name: str, samples: Iterable[Sample], codec: Codec = "png", quality: int = 95) -> "PackedShard":
        """Pack samples; the same samples give the same bytes."""
        tar, index = pack_shard(samples, codec, quality)
        index_bytes = index.to_bytes()
        record = ShardRecord(
            file=tar_name,
            samples=len(index),
            bytes=len(tar),
            sha256=storage.digest(tar),
            index_sha256=storage.digest(index_bytes),
        )
        return cls(tar, index_bytes, record)

    def write(self, path: str) -> ShardRecord:
        """Write index and tar, each whole or not at all, the index first; returns the record."""
        storage.write_bytes(storage.join(path, index_name(self.record.file)), self.index)
        storage.write_bytes(storage.join(path, self.record.file), self.tar)
        return self.record


def publish_manifest(path: str, manifest: Manifest) -> None:
    """Write the manifest, which makes the folder a data set; what killed writers left there goes."""
    storage.remove_abandoned(path)
    storage.write_bytes(storage.join(path, MANIFEST_NAME), manifest.to_json())
