"""Write samples as shards: reproducible tar files, an index next to each, and the manifest last.

The tar files are byte-identical to those of webdataset's ``TarWriter``. The package webdataset imports torch, which
takes 700 MiB in every process that packs, so this module writes the tar headers itself. A test compares the two.
"""

import functools
import json
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tarflow_scale import storage
from tarflow_scale.shards.images import CODECS, Codec, encode_image
from tarflow_scale.shards.index import ShardIndex, checksum
from tarflow_scale.shards.manifest import MANIFEST_NAME, Manifest, ShardRecord, index_name

__all__ = ["PackedShard", "Sample", "pack_shard", "publish_manifest"]

_MODIFIED_SECONDS = 0
"""Time stamp of every member, so that equal samples give equal bytes. An integer; a float needs pax headers."""
_MODE, _OWNER = 0o444, "bigdata"
"""Permissions, and user and group, of every member, as in webdataset."""

_NAME = slice(0, 100)
_SIZE = slice(124, 136)
_SUM = slice(148, 156)
"""Fields of a tar header (POSIX ustar): a name, and two octal numbers."""
_LARGE_BYTES = 8**11
"""The smallest size that does not fit into a header."""


@dataclass(frozen=True)
class Sample:
    """One sample: an image, a label and metadata, which are written as members of a tar.

    Args:
        key: base name of the members.
        image: ``(C, H, W)`` uint8; or encoded members, by extension.
        label: content of ``.cls``; None writes no such member.
        metadata: content of ``.json``.
    """

    key: str
    image: NDArray[np.uint8] | Mapping[str, bytes]
    label: int | None
    metadata: dict[str, Any] = field(default_factory=dict)


def pack_shard(samples: Iterable[Sample], codec: Codec = "png", quality: int = 95) -> tuple[bytes, ShardIndex]:
    """Tar and index of a shard; the same samples give the same bytes."""
    parts: list[bytes] = []
    offsets, checksums = [0], list[int]()
    for sample in samples:
        image = sample.image
        encoded = {CODECS[codec]: encode_image(image, codec, quality)} if isinstance(image, np.ndarray) else image
        members = dict(encoded)
        if sample.label is not None:
            members["cls"] = str(sample.label).encode()
        members["json"] = json.dumps(sample.metadata, sort_keys=True).encode()
        content = _tarred(sample.key, members)
        parts.append(content)
        offsets.append(offsets[-1] + len(content))
        checksums.append(checksum(content))
    end = offsets[-1] + 2 * tarfile.BLOCKSIZE
    parts.append(bytes(2 * tarfile.BLOCKSIZE + -end % tarfile.RECORDSIZE))
    return b"".join(parts), ShardIndex(np.array(offsets, dtype=np.int64), np.array(checksums, dtype=np.uint64))


def _tarred(key: str, members: dict[str, bytes]) -> bytes:
    """The members of a sample, sorted by extension."""
    parts: list[bytes | bytearray] = []
    for extension, content in sorted(members.items()):
        parts += (_header(key, extension, len(content)), content, bytes(-len(content) % tarfile.BLOCKSIZE))
    return b"".join(parts)


def _header(key: str, extension: str, size: int) -> bytes | bytearray:
    """The header of a member; for plain names and sizes, in a tenth of `tarfile`'s time."""
    name = f"{key}.{extension}".encode(errors="surrogateescape")
    if len(name) > _NAME.stop or not name.isascii() or size >= _LARGE_BYTES:
        return _any_header(f"{key}.{extension}", size)
    blank, rest = _blank_header()
    header, digits = bytearray(blank), b"%011o" % size
    header[_NAME] = name.ljust(100, b"\0")
    header[_SIZE] = digits + b"\0"
    header[_SUM] = b"%06o\0 " % (rest + sum(name) + sum(digits))
    return header


def _any_header(name: str, size: int) -> bytes:
    """A header for any name and size, with pax records if a plain header has no room."""
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = size, _MODIFIED_SECONDS, _MODE
    info.uname = info.gname = _OWNER
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


@functools.cache
def _blank_header() -> tuple[bytes, int]:
    """A header without name, size and sum; and the sum of its bytes."""
    header = bytearray(_any_header("", 0))
    header[_NAME], header[_SIZE], header[_SUM] = bytes(100), bytes(12), b" " * 8
    return bytes(header), sum(header)


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
        """Write index and tar, each atomically, the index first; returns the record."""
        storage.write_bytes(storage.join(path, index_name(self.record.file)), self.index)
        storage.write_bytes(storage.join(path, self.record.file), self.tar)
        return self.record


def publish_manifest(path: str, manifest: Manifest) -> None:
    """Remove what killed writers left, and write the manifest, which makes the folder a data set."""
    storage.remove_abandoned(path)
    storage.write_bytes(storage.join(path, MANIFEST_NAME), manifest.to_json())
