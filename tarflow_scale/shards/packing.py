"""Packing: numbers of images to shards, in this process or in several, again from where it was killed.

A shard is a unit of work and depends on the plan alone, so packing has the same bytes whoever does it. Beside each
finished shard lies a note, ``.train-00000.packed.json``, with its record and the plan it belongs to; a packing that
goes on trusts a shard whose note is of the same plan and whose bytes have the digests of the note. The notes go when
the manifest is published.

A folder is written to only if it was empty when packing began, which a marker in it says, ``.packing``; what is in a
folder without a marker or a manifest belongs to somebody else, whatever it is called.
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
from tarflow_scale.shards.manifest import ShardRecord, index_name
from tarflow_scale.shards.sources import BadImage, ImageSource
from tarflow_scale.shards.vectors import vector_members
from tarflow_scale.shards.workers import in_workers
from tarflow_scale.shards.writer import PackedShard, Sample

__all__ = [
    "PackNote",
    "Packing",
    "SkippedImage",
    "claim",
    "clear",
    "list_dropped",
    "list_skipped",
    "pack",
    "read_fingerprints",
    "refuse_foreign",
    "remove_notes",
]

_MARKER = ".packing"
_REMOTE_READS = 16
"""Images of a store that are read at once by a process; local ones are read as they are needed."""
_UNIT = 1000
"""Images of a unit of work that only looks at them."""


class SkippedImage(Record):
    """An image of the source that was left out."""

    origin: str
    reason: str


class PackNote(Record):
    """What one unit of work left: the shard's record, None if no image of it could be used."""

    plan: str
    record: ShardRecord | None
    skipped: tuple[SkippedImage, ...]
    fingerprints: str = ""
    """Of all images of the plan, if they were asked for; see `tarflow_scale.shards.duplicates`."""


@dataclass(frozen=True)
class Packing:
    """The plan of one split.

    Args:
        source: where the images are.
        path: folder or URL of the split.
        split: its name.
        order: numbers of its images in the source, in the order in which they are packed.
        samples_per_shard: images of a shard.
        codec, quality: how images are encoded.
        skip_bad: leave images out that cannot be used, instead of failing.
        plan: digest of everything that the bytes depend on.
        fingerprints: keep what tells near copies in the notes.
    """

    source: ImageSource
    path: str
    split: str
    order: NDArray[np.int64]
    samples_per_shard: int
    codec: Codec
    quality: int
    skip_bad: bool
    plan: str
    fingerprints: bool = False

    @property
    def num_shards(self) -> int:
        """Units of work."""
        return -(-len(self.order) // self.samples_per_shard)

    def tar_name(self, number: int) -> str:
        """``train-00007.tar``."""
        return f"{self.split}-{number:05d}.tar"

    def done(self, number: int) -> PackNote | None:
        """The note of a shard that an earlier run finished, if it is whole and of this plan."""
        location = storage.join(self.path, _note_name(self.tar_name(number)))
        if not storage.exists(location):
            return None
        try:
            note = PackNote.model_validate_json(storage.read_bytes(location))
        except ValidationError:
            return None
        if note.plan != self.plan or (self.fingerprints and not note.fingerprints):
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
        """Pack one shard and leave its note.

        Raises:
            BadImage: an image cannot be used, and none may be skipped.
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
            plan=self.plan, record=record, skipped=tuple(skipped), fingerprints=duplicates.text_of(fingerprints)
        )
        storage.write_bytes(storage.join(self.path, _note_name(self.tar_name(number))), note.to_json())
        return note

    def _samples(self, number: int, skipped: list[SkippedImage], fingerprints: list[bytes]) -> Iterator[Sample]:
        first = number * self.samples_per_shard
        labelled = bool(self.source.class_names)
        members = self.order[first : first + self.samples_per_shard].tolist()
        for place, (image, pixels) in enumerate(zip(members, self._images(members), strict=True)):
            origin = self.source.origin(image)
            if self.fingerprints:
                fingerprints.append(_fingerprint(pixels))
            if isinstance(pixels, BadImage):
                if not self.skip_bad:
                    raise pixels
                skipped.append(SkippedImage(origin=origin, reason=str(pixels)))
                continue
            label = int(self.source.labels[image]) if labelled else None
            facts = self.source.vectors
            stored = pixels if facts is None else vector_members(pixels, facts)
            yield Sample(f"{first + place:08d}", stored, label, {"origin": origin})

    def _images(self, members: list[int]) -> Iterator[NDArray[np.uint8] | BadImage]:
        """The images, a few of them read ahead where the source is a store."""
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


def _fingerprint(image: NDArray[np.uint8] | BadImage) -> bytes:
    return duplicates.NO_FINGERPRINT if isinstance(image, BadImage) else duplicates.fingerprint(image)


def _fingerprints(unit: int, source: ImageSource, skip_bad: bool) -> str:
    """Fingerprints of the images of one unit of work."""
    found: list[bytes] = []
    for number in range(unit * _UNIT, min((unit + 1) * _UNIT, len(source))):
        try:
            found.append(duplicates.fingerprint(source.image(number)))
        except BadImage:
            if not skip_bad:
                raise
            found.append(duplicates.NO_FINGERPRINT)
    return duplicates.text_of(found)


def read_fingerprints(source: ImageSource, skip_bad: bool, num_workers: int) -> NDArray[np.uint64]:
    """Fingerprints ``(n, 2)`` of all images of a source, by number; every image is decoded for it.

    Raises:
        BadImage: an image cannot be used, and none may be skipped.
        UserError: a worker was killed.
    """
    units = list(range(-(-len(source) // _UNIT)))
    texts: list[str] = []
    with console.progress_bar(len(source), "look for copies") as bar:
        read = partial(_fingerprints, source=source, skip_bad=skip_bad)
        for unit, text in enumerate(in_workers(read, units, num_workers)):
            texts.append(text)
            bar.update(min(_UNIT, len(source) - unit * _UNIT))
    return duplicates.read_fingerprints(texts)


def pack(packing: Packing, num_workers: int) -> list[PackNote]:
    """Pack all shards that are not packed yet; the notes of all, in order.

    Raises:
        BadImage: an image cannot be used.
        UserError: a worker was killed.
    """
    _remove_others(packing)
    notes = {number: note for number in range(packing.num_shards) if (note := packing.done(number)) is not None}
    missing = [number for number in range(packing.num_shards) if number not in notes]
    if notes:
        print(f"{packing.path}: going on, {len(notes)} of {packing.num_shards} shards are packed")
    with console.progress_bar(len(packing.order), f"prepare {packing.split}") as bar:
        size = packing.samples_per_shard
        bar.update(sum(min(size, len(packing.order) - number * size) for number in notes))
        for number, note in zip(missing, in_workers(packing.pack, missing, num_workers), strict=True):
            notes[number] = note
            bar.update(min(size, len(packing.order) - number * size))
    return [notes[number] for number in range(packing.num_shards)]


def _note_name(tar_name: str) -> str:
    return f".{tar_name.removesuffix('.tar')}.packed.json"


def refuse_foreign(path: str) -> None:
    """See that a folder without a manifest is empty, or ours.

    Raises:
        DataError: it holds files of somebody else.
    """
    names = storage.list_names(path)
    if names and _MARKER not in names:
        raise DataError(f"{path} holds other files (got {names[0]}); choose another shards.path")


def claim(path: str) -> None:
    """Make an empty folder ours."""
    storage.write_bytes(storage.join(path, _MARKER), b"tarflow-scale prepare is not done here")


def clear(path: str) -> None:
    """Remove what an unfinished packing left."""
    if _MARKER in storage.list_names(path):
        storage.remove_tree(path)


def list_skipped(packing: Packing, notes: list[PackNote]) -> None:
    """List images that were left out in ``skipped.jsonl``, if there are any."""
    skipped = [one for note in notes for one in note.skipped]
    if skipped:
        lines = "".join(json.dumps(one.model_dump()) + "\n" for one in skipped)
        storage.write_bytes(storage.join(packing.path, "skipped.jsonl"), lines.encode())


def list_dropped(packing: Packing, copies: list[duplicates.Copy]) -> None:
    """List images that were dropped, and which ones they are like, in ``dropped.jsonl``, if there are any."""
    if copies:
        origin = packing.source.origin
        rows = [{"origin": origin(one.image), "like": origin(one.like), "is_equal": one.is_equal} for one in copies]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        storage.write_bytes(storage.join(packing.path, "dropped.jsonl"), lines.encode())


def remove_notes(packing: Packing) -> None:
    """Remove notes and marker of a packing whose manifest is published."""
    for number in range(packing.num_shards):
        storage.remove(storage.join(packing.path, _note_name(packing.tar_name(number))))
    storage.remove(storage.join(packing.path, _MARKER))


def _remove_others(packing: Packing) -> None:
    """Remove half-written files, and shards beyond the plan's; all that is here was written by us."""
    wanted = {_MARKER}
    for number in range(packing.num_shards):
        tar = packing.tar_name(number)
        wanted |= {tar, index_name(tar), _note_name(tar)}
    for name in storage.list_names(packing.path):
        if name not in wanted:
            storage.remove(storage.join(packing.path, name))
