"""Packing: numbers of images to shards, in this process or in several, again from where it was killed.

A shard is a unit of work and depends on the plan alone, so packing has the same bytes whoever does it. Beside each
finished shard lies a note, ``.train-00000.packed.json``, with its record and the plan it belongs to; a packing that
goes on trusts a shard whose note is of the same plan and whose bytes have the digests of the note. The notes go when
the manifest is published.
"""

import json
import multiprocessing
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from tarflow_scale import storage, telemetry
from tarflow_scale.errors import UserError
from tarflow_scale.records import Record
from tarflow_scale.shards.images import Codec
from tarflow_scale.shards.manifest import ShardRecord, index_name
from tarflow_scale.shards.sources import BadImage, ImageSource
from tarflow_scale.shards.writer import PackedShard, Sample

__all__ = ["PackNote", "Packing", "SkippedImage", "clear", "is_ours", "list_skipped", "pack", "remove_notes"]


class SkippedImage(Record):
    """An image of the source that was left out."""

    origin: str
    reason: str


class PackNote(Record):
    """What one unit of work left: the shard's record, None if no image of it could be used."""

    plan: str
    record: ShardRecord | None
    skipped: tuple[SkippedImage, ...]


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
        if note.plan != self.plan:
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
        samples = list(self._samples(number, skipped))
        record = None
        if samples:
            record = PackedShard.of(self.tar_name(number), samples, self.codec, self.quality).write(self.path)
        note = PackNote(plan=self.plan, record=record, skipped=tuple(skipped))
        storage.write_bytes(storage.join(self.path, _note_name(self.tar_name(number))), note.to_json())
        return note

    def _samples(self, number: int, skipped: list[SkippedImage]) -> Iterator[Sample]:
        first = number * self.samples_per_shard
        labelled = bool(self.source.class_names)
        for place, image in enumerate(self.order[first : first + self.samples_per_shard]):
            origin = self.source.origin(int(image))
            try:
                pixels = self.source.image(int(image))
            except BadImage as error:
                if not self.skip_bad:
                    raise
                skipped.append(SkippedImage(origin=origin, reason=str(error)))
                continue
            label = int(self.source.labels[image]) if labelled else None
            yield Sample(f"{first + place:08d}", pixels, label, {"origin": origin})


def pack(packing: Packing, num_workers: int) -> list[PackNote]:
    """Pack all shards that are not packed yet; the notes of all, in order.

    Raises:
        BadImage: an image cannot be used.
        UserError: a worker was killed.
    """
    _remove_foreign(packing)
    notes = {number: note for number in range(packing.num_shards) if (note := packing.done(number)) is not None}
    missing = [number for number in range(packing.num_shards) if number not in notes]
    if notes:
        print(f"{packing.path}: going on, {len(notes)} of {packing.num_shards} shards are packed")
    with telemetry.progress_bar(len(packing.order), f"prepare {packing.split}") as bar:
        size = packing.samples_per_shard
        bar.update(sum(min(size, len(packing.order) - number * size) for number in notes))
        for number, note in _run(packing, missing, num_workers):
            notes[number] = note
            bar.update(min(size, len(packing.order) - number * size))
    return [notes[number] for number in range(packing.num_shards)]


def _run(packing: Packing, missing: list[int], num_workers: int) -> Iterator[tuple[int, PackNote]]:
    if num_workers <= 1 or len(missing) <= 1:
        yield from ((number, packing.pack(number)) for number in missing)
        return
    context = multiprocessing.get_context("spawn")  # a fork would share open files and the threads of stores
    workers = min(num_workers, len(missing))
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(packing,))
    try:
        futures = {pool.submit(_pack_in_worker, number): number for number in missing}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise UserError(  # not DataError: what is packed stays, to go on from
            f"a packing process died ({error}); is memory short? lower shards.num_workers and run it again to go on"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_packing_of_worker: list[Packing] = []


def _start_worker(packing: Packing) -> None:
    _packing_of_worker[:] = [packing]


def _pack_in_worker(number: int) -> PackNote:
    return _packing_of_worker[0].pack(number)


def _note_name(tar_name: str) -> str:
    return f".{tar_name.removesuffix('.tar')}.packed.json"


def is_ours(name: str, split: str) -> bool:
    """Whether a file is of a packing of this split that was not finished."""
    shard = rf"{split}-\d{{5,}}(\.tar|\.index\.npz)|\.{split}-\d{{5,}}\.packed\.json"
    return re.fullmatch(rf"{shard}|skipped\.jsonl|\.[0-9a-f]{{32}}\.partial", name) is not None


def clear(path: str, split: str) -> None:
    """Remove what an unfinished packing left, and the folder if nothing else is in it."""
    names = storage.list_names(path)
    ours = [name for name in names if is_ours(name, split)]
    for name in ours:
        storage.remove(storage.join(path, name))
    if names and len(ours) == len(names):
        storage.remove_tree(path)


def list_skipped(packing: Packing, notes: list[PackNote]) -> None:
    """List images that were left out in ``skipped.jsonl``, if there are any."""
    skipped = [one for note in notes for one in note.skipped]
    if skipped:
        lines = "".join(json.dumps(one.model_dump()) + "\n" for one in skipped)
        storage.write_bytes(storage.join(packing.path, "skipped.jsonl"), lines.encode())


def remove_notes(packing: Packing) -> None:
    """Remove the notes of a packing whose manifest is published."""
    for number in range(packing.num_shards):
        storage.remove(storage.join(packing.path, _note_name(packing.tar_name(number))))


def _remove_foreign(packing: Packing) -> None:
    """Remove half-written files, and shards beyond the plan's."""
    wanted = {
        name
        for number in range(packing.num_shards)
        for name in (
            packing.tar_name(number),
            index_name(packing.tar_name(number)),
            _note_name(packing.tar_name(number)),
        )
    }
    for name in storage.list_names(packing.path):
        if is_ours(name, packing.split) and name not in wanted:
            storage.remove(storage.join(packing.path, name))
