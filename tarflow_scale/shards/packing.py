"""Pack the images of a source into shards, in one or several processes, and resume a packing that was killed.

Each shard is a unit of work. Its bytes depend only on its `Packing`, so any process writes the same bytes. Beside each
finished shard is a note, ``.train-00000.packed.json``, with the record of the shard and the digest of the `Packing`. A
resumed packing keeps a shard if its note has the digest of this `Packing` and its files have the digests in the note.
The notes are removed when the manifest is published.

Packing starts only in an empty folder, and marks it with the file ``.packing``. A folder with other files, but without
this marker or a manifest, is refused.
"""

import json
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain, repeat

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from tarflow_scale import storage
from tarflow_scale.errors import DataError
from tarflow_scale.records import Record
from tarflow_scale.runtime import console
from tarflow_scale.shards import duplicates
from tarflow_scale.shards.images import Codec
from tarflow_scale.shards.manifest import Manifest, ShardRecord, index_name
from tarflow_scale.shards.sources import BadImage, ImageSource
from tarflow_scale.shards.workers import in_workers
from tarflow_scale.shards.writer import PackedShard, Sample, publish_manifest

__all__ = [
    "PackNote",
    "Packing",
    "SkippedImage",
    "claim",
    "clear",
    "pack",
    "publish",
    "read_fingerprints",
    "refuse_foreign",
]

_MARKER = ".packing"
_REMOTE_READS = 16
"""Number of images that a process reads from a URL at the same time; local images are read one by one."""
_UNIT = 1000
"""Number of images per unit of work when fingerprints are computed."""


class SkippedImage(Record):
    """An image of the source that was left out."""

    origin: str
    reason: str


class PackNote(Record):
    """The result of packing one shard. The record is None if no image of the shard could be used."""

    digest: str
    """Digest of the `Packing`."""
    record: ShardRecord | None
    skipped: tuple[SkippedImage, ...]
    fingerprints: str = ""
    """Fingerprints of all images of the shard, or empty if not needed; see `tarflow_scale.shards.duplicates`."""


@dataclass(frozen=True)
class Packing:
    """How one split is packed.

    Args:
        source: source of the images.
        path: folder or URL of the split.
        split: name of the split.
        order: image numbers of the split in the source, in the order of packing.
        samples_per_shard: number of images per shard.
        codec, quality: how images are encoded.
        skip_bad: leave out images that cannot be used, instead of failing.
        digest: digest of all inputs that determine the bytes of the shards.
        fingerprints: store fingerprints in the notes, to find near copies after packing.
        dropped: images that are left out as copies or near copies; None if near copies are kept.
    """

    source: ImageSource
    path: str
    split: str
    order: NDArray[np.int64]
    samples_per_shard: int
    codec: Codec
    quality: int
    skip_bad: bool
    digest: str
    fingerprints: bool = False
    dropped: list[duplicates.Copy] | None = None

    @property
    def num_shards(self) -> int:
        """Number of shards to pack."""
        return -(-len(self.order) // self.samples_per_shard)

    def tar_name(self, number: int) -> str:
        """File name of a shard: ``train-00007.tar``."""
        return f"{self.split}-{number:05d}.tar"

    def done(self, number: int) -> PackNote | None:
        """The note of a shard that an earlier run of this packing finished; None if there is no intact shard."""
        location = storage.join(self.path, _note_name(self.tar_name(number)))
        if not storage.exists(location):
            return None
        try:
            note = PackNote.model_validate_json(storage.read_bytes(location))
        except ValidationError:
            return None
        if note.digest != self.digest or (self.fingerprints and not note.fingerprints):
            return None
        if note.record is None:
            return note
        for name, sha256 in (
            (note.record.file, note.record.sha256),
            (index_name(note.record.file), note.record.index_sha256),
        ):
            file = storage.join(self.path, name)
            if not storage.exists(file) or storage.digest(storage.read_bytes(file)) != sha256:
                return None
        return note

    def pack(self, number: int) -> PackNote:
        """Pack one shard and write its note.

        Raises:
            BadImage: an image cannot be used, and ``skip_bad`` is false.
        """
        skipped: list[SkippedImage] = []
        fingerprints: list[bytes] = []
        samples = self._samples(number, skipped, fingerprints)
        first = next(samples, None)
        record = None
        if first is not None:
            packed = PackedShard.of(self.tar_name(number), chain([first], samples), self.codec, self.quality)
            record = packed.write(self.path)
        note = PackNote(
            digest=self.digest, record=record, skipped=tuple(skipped), fingerprints=duplicates.text_of(fingerprints)
        )
        storage.write_bytes(storage.join(self.path, _note_name(self.tar_name(number))), note.to_json())
        return note

    def _samples(self, number: int, skipped: list[SkippedImage], fingerprints: list[bytes]) -> Iterator[Sample]:
        first = number * self.samples_per_shard
        labelled, event = bool(self.source.class_names), self.source.event
        members = self.order[first : first + self.samples_per_shard].tolist()
        for place, (image, pixels) in enumerate(zip(members, self._images(members), strict=True)):
            origin = self.source.origin(image)
            is_bad = isinstance(pixels, BadImage)
            if self.fingerprints:
                fingerprints.append(duplicates.NO_FINGERPRINT if is_bad else duplicates.fingerprint(pixels))
            if is_bad:
                if not self.skip_bad:
                    raise pixels
                skipped.append(SkippedImage(origin=origin, reason=str(pixels)))
                continue
            label = int(self.source.labels[image]) if labelled else None
            yield Sample(f"{first + place:08d}", event.content(pixels), label, {"origin": origin})

    def _images(self, members: list[int]) -> Iterator[NDArray[np.uint8] | BadImage]:
        """Yield the images; if the source is remote, threads read some images ahead."""
        if not self.source.is_remote:
            yield from map(self._image, members)
            return
        with ThreadPoolExecutor(_REMOTE_READS, "read-ahead") as threads:
            ahead = deque(threads.submit(self._image, image) for image in members[: 2 * _REMOTE_READS])
            for following in [*members[2 * _REMOTE_READS :], *repeat(None, len(ahead))]:
                yield ahead.popleft().result()
                if following is not None:
                    ahead.append(threads.submit(self._image, following))

    def _image(self, number: int) -> NDArray[np.uint8] | BadImage:
        try:
            return self.source.image(number)
        except BadImage as error:
            return error


def _fingerprints(unit: int, source: ImageSource, skip_bad: bool) -> str:
    """Fingerprints of the images of one unit of work."""
    fingerprints: list[bytes] = []
    for number in range(unit * _UNIT, min((unit + 1) * _UNIT, len(source))):
        try:
            fingerprints.append(duplicates.fingerprint(source.image(number)))
        except BadImage:
            if not skip_bad:
                raise
            fingerprints.append(duplicates.NO_FINGERPRINT)
    return duplicates.text_of(fingerprints)


def read_fingerprints(source: ImageSource, skip_bad: bool, num_workers: int) -> NDArray[np.uint64]:
    """Decode all images of a source, and compute their fingerprints ``(n, 2)``, in the order of image numbers.

    Raises:
        BadImage: an image cannot be used, and ``skip_bad`` is false.
        UserError: a worker died.
    """
    units = list(range(-(-len(source) // _UNIT)))
    texts: list[str] = []
    with console.ProgressBar(len(source), "look for copies") as bar:
        read = partial(_fingerprints, source=source, skip_bad=skip_bad)
        for unit, text in enumerate(in_workers(read, units, num_workers)):
            texts.append(text)
            bar.update(min(_UNIT, len(source) - unit * _UNIT))
    return duplicates.read_fingerprints(texts)


def pack(packing: Packing, num_workers: int) -> list[PackNote]:
    """Pack all shards that are not packed yet; returns the notes of all shards, in order.

    Raises:
        BadImage: an image cannot be used, and ``skip_bad`` is false.
        UserError: a worker died.
    """
    _remove_others(packing)
    notes = {number: note for number in range(packing.num_shards) if (note := packing.done(number)) is not None}
    missing = [number for number in range(packing.num_shards) if number not in notes]
    if notes:
        print(f"{packing.path}: continuing, {len(notes)} of {packing.num_shards} shards are packed")
    with console.ProgressBar(len(packing.order), f"prepare {packing.split}") as bar:
        size = packing.samples_per_shard
        bar.update(sum(min(size, len(packing.order) - number * size) for number in notes))
        for number, note in zip(missing, in_workers(packing.pack, missing, num_workers), strict=True):
            notes[number] = note
            bar.update(min(size, len(packing.order) - number * size))
    return [notes[number] for number in range(packing.num_shards)]


def _note_name(tar_name: str) -> str:
    return f".{tar_name.removesuffix('.tar')}.packed.json"


def refuse_foreign(path: str) -> None:
    """Check that a folder without a manifest is empty, or holds an unfinished packing.

    Raises:
        DataError: the folder holds other files.
    """
    names = storage.list_names(path)
    if names and _MARKER not in names:
        raise DataError(f"{path} holds other files (got {names[0]}); choose another shards.path")


def claim(path: str) -> None:
    """Mark an empty folder as an unfinished packing."""
    storage.write_bytes(storage.join(path, _MARKER), b"tarflow-scale prepare is not done here")


def clear(path: str) -> None:
    """Remove a folder if it holds an unfinished packing."""
    if _MARKER in storage.list_names(path):
        storage.remove_tree(path)


def publish(packing: Packing, notes: list[PackNote], manifest: Manifest) -> None:
    """Finish a packed split: write the lists of left-out images and the manifest, then remove the notes."""
    origin = packing.source.origin
    lists = {
        "skipped.jsonl": [image.model_dump() for note in notes for image in note.skipped],
        "dropped.jsonl": [
            {"origin": origin(copy.image), "like": origin(copy.like), "is_equal": copy.is_equal}
            for copy in packing.dropped or []
        ],
    }
    for name, rows in lists.items():
        if rows:
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            storage.write_bytes(storage.join(packing.path, name), lines.encode())
    publish_manifest(packing.path, manifest)
    for number in range(packing.num_shards):
        storage.remove(storage.join(packing.path, _note_name(packing.tar_name(number))))
    storage.remove(storage.join(packing.path, _MARKER))


def _remove_others(packing: Packing) -> None:
    """Remove files of an earlier packing that do not belong to this packing, for example incomplete files."""
    wanted = {_MARKER}
    for number in range(packing.num_shards):
        tar = packing.tar_name(number)
        wanted |= {tar, index_name(tar), _note_name(tar)}
    for name in storage.list_names(packing.path):
        if name not in wanted:
            storage.remove(storage.join(packing.path, name))
