"""Shards that several writers make in one folder; a shard has the same bytes from every writer.

A writer stores a note and the record of what the shard will be, then writes the shard, then reads it back. The record
is created only if it is absent, so a shard that comes out with other bytes than before is noticed.
"""

from dataclasses import dataclass

from tarflow_scale import storage
from tarflow_scale.errors import PlanError, StorageError
from tarflow_scale.shards.manifest import ShardRecord, index_name
from tarflow_scale.shards.writer import PackedShard

__all__ = ["RecordedShards"]

_RECORDS = "records"


@dataclass(frozen=True)
class RecordedShards:
    """The shards of a folder, by the name of their tar.

    Args:
        path: folder or URL.
        notes: name of the folder below it that holds the notes.
    """

    path: str
    notes: str

    @property
    def folders(self) -> tuple[str, str]:
        """Folders below ``path`` that hold one file for each shard."""
        return _RECORDS, self.notes

    def record(self, tar_name: str) -> ShardRecord:
        """The record of a shard."""
        location = self._location(_RECORDS, tar_name)
        return ShardRecord.from_json(storage.read_bytes(location), location)

    def note(self, tar_name: str) -> bytes | None:
        """The note of a shard; None if its file is missing."""
        return storage.read_if_there(self._location(self.notes, tar_name))

    def is_done(self, tar_name: str) -> bool:
        """Whether record, tar and index exist, and the digests of tar and index match the record."""
        tar, index = storage.join(self.path, tar_name), storage.join(self.path, index_name(tar_name))
        if not all(map(storage.exists, (self._location(_RECORDS, tar_name), tar, index))):
            return False
        record = self.record(tar_name)
        return _digest(tar) == record.sha256 and _digest(index) == record.index_sha256

    def write(self, shard: PackedShard, note: bytes) -> None:
        """Store note and record, write index and tar, and read both back.

        Raises:
            PlanError: an earlier record names other bytes, so this is another machine or library version.
            StorageError: the shard reads differently from what was written.
        """
        record = shard.record
        storage.write_bytes(self._location(self.notes, record.file), note)
        if not storage.create(self._location(_RECORDS, record.file), record.to_json()):
            earlier = self.record(record.file)
            if earlier != record:
                raise PlanError(
                    f"{record.file} must have the same bytes as in the first run (got sha256 {record.sha256[:12]}, not "
                    f"{earlier.sha256[:12]}); use the package versions and the device of the first run, or choose "
                    f"another shards.path"
                )
        shard.write(self.path)
        if not self.is_done(record.file):
            raise StorageError(f"{self.path}/{record.file} reads differently from what was written; check the disk")

    def remove_abandoned(self) -> None:
        """Remove what killed writers left in the folders of records and notes."""
        for folder in self.folders:
            storage.remove_abandoned(storage.join(self.path, folder))

    def _location(self, folder: str, tar_name: str) -> str:
        return storage.join(self.path, folder, tar_name.removesuffix(".tar") + ".json")


def _digest(location: str) -> str:
    with storage.local_copy(location) as copy:
        return storage.digest(copy)
