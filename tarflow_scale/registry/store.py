"""What all models of a registry share: content-addressed blobs, and proof that the store gives one winner.

``<registry>/blobs/sha256/<hex>`` holds a file once, whoever names it. ``<registry>/registry.json`` says how events are
claimed: by create-if-absent where the store was seen to have it, or by check-then-write where one writer was promised.
"""

import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from pydantic import Field

from tarflow_scale import storage
from tarflow_scale.errors import RegistryError, StorageError
from tarflow_scale.records import FileRecord, Record

__all__ = ["Marker", "Store"]

_BLOBS = "blobs"
_MARKER = "registry.json"
_FORMAT = 1
_PROBE = ".probe"
_WRITERS, _KEYS = 8, 100
FRESH_SECONDS = 3600.0
"""A blob that is older is written again when something new names it, so that a collector sees that it is wanted."""


class Marker(Record):
    """What ``init`` leaves."""

    format: int = Field(ge=1)
    single_writer: bool = False
    """Events are claimed by check-then-write; whoever set this promised that only one process writes."""
    checked: str = ""
    """How create-if-absent was tried."""


class Store:
    """The files below a registry's folder that belong to no single model.

    Args:
        path: folder or URL of the registry.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._marker: Marker | None = None

    # -- create-if-absent ----------------------------------------------------------------------------------------------

    def marker(self) -> Marker | None:
        """What ``init`` left; None where there was no ``init``.

        Raises:
            RegistryError: of a later version of this package.
        """
        if self._marker is None:
            location = storage.join(self.path, _MARKER)
            content = storage.read_if_there(location)
            if content is not None:
                marker = Marker.from_json(content, location)
                if marker.format > _FORMAT:
                    raise RegistryError(
                        f"{self.path} is a registry of format {marker.format} (this package knows {_FORMAT}); upgrade "
                        f"tarflow-scale"
                    )
                self._marker = marker
        return self._marker

    def init(self, single_writer: bool = False) -> Marker:
        """Try whether of many writers one wins, and leave a marker; what is there already stays.

        Raises:
            RegistryError: several won, and ``single_writer`` is not set.
        """
        if (there := self.marker()) is not None:
            return there
        checked = "" if single_writer else self.probe()
        return self._mark(Marker(format=_FORMAT, single_writer=single_writer, checked=checked))

    def probe(self, num_keys: int = _KEYS) -> str:
        """Have many writers create the same names at once; says what was tried. Nothing of it stays.

        Raises:
            RegistryError: several won one name.
        """
        winners = self._winners(num_keys)
        if winners > num_keys:
            raise RegistryError(
                f"{self.path} has no create-if-absent ({winners} of {_WRITERS} writers won {num_keys} names); use a "
                f"store that has it, or promise a single writer with command.single_writer=true"
            )
        return f"{_WRITERS} writers, {num_keys} names, {winners} winners"

    def create(self, location: str, content: bytes) -> bool:
        """Create a file unless it exists; of many writers one gets True."""
        marker = self.marker() or self._first_write()
        if not marker.single_writer:
            return storage.create(location, content)
        if storage.exists(location):
            return False
        storage.write_bytes(location, content)
        return True

    def _first_write(self) -> Marker:
        """A registry that nobody has initialised: local file systems have hard links, of others it is seen."""
        return self.init() if storage.is_remote(self.path) else self._mark(Marker(format=_FORMAT))

    def _mark(self, marker: Marker) -> Marker:
        location = storage.join(self.path, _MARKER)
        if not storage.exists(location):
            storage.write_bytes(location, marker.to_json())
        self._marker = None
        found = self.marker()
        assert found is not None
        return found

    def _winners(self, num_keys: int) -> int:
        folder = storage.join(self.path, f"{_PROBE}-{uuid.uuid4().hex}")
        barrier = threading.Barrier(_WRITERS)

        def write(writer: int) -> int:
            won = 0
            try:
                for key in range(num_keys):
                    barrier.wait()
                    won += storage.create(storage.join(folder, f"{key:03d}"), f"{writer}".encode())
            except threading.BrokenBarrierError:
                return 0  # another writer failed, and says why
            except BaseException:
                barrier.abort()  # or the others would wait for this one
                raise
            return won

        try:
            with ThreadPoolExecutor(_WRITERS) as pool:
                return sum(pool.map(write, range(_WRITERS)))
        finally:
            with suppress(StorageError):
                storage.remove_tree(folder)

    # -- blobs ---------------------------------------------------------------------------------------------------------

    def blob(self, digest: str) -> str:
        """Where the content with this SHA-256 is."""
        return storage.join(self.path, _BLOBS, "sha256", digest)

    def blobs(self) -> dict[str, int]:
        """Bytes of every blob, by digest."""
        folder = storage.join(self.path, _BLOBS, "sha256")
        return storage.list_sizes(folder) if storage.exists(folder) else {}

    def keep(self, content: bytes) -> FileRecord:
        """Keep content under its digest; an event may name it from here on."""
        record = FileRecord(sha256=storage.digest(content), bytes=len(content))
        location = self.blob(record.sha256)
        written = storage.modified_seconds(location)
        if written is None or time.time() - written > FRESH_SECONDS:
            storage.write_bytes(location, content)
        return record

    def read(self, name: str, record: FileRecord) -> bytes:
        """What `keep` kept, verified; ``name`` is for the error.

        Raises:
            RegistryError: missing, or not what the digest says.
        """
        location = self.blob(record.sha256)
        content = storage.read_if_there(location)
        if content is None:
            raise RegistryError(f"{name} is missing from the registry ({location}); restore the blob")
        if storage.digest(content) != record.sha256:
            raise RegistryError(f"{name} does not match its digest ({location}); restore the blob")
        return content

    def problems(self, needed: dict[str, str], seen: Callable[[str], None]) -> list[str]:
        """What is wrong with blobs: each is read and its digest computed.

        Args:
            needed: what names each digest, in words.
            seen: called with each digest.
        """
        found: list[str] = []
        for digest, name in sorted(needed.items()):
            with_content = storage.read_if_there(self.blob(digest))
            if with_content is None:
                found.append(f"{name} is missing ({self.blob(digest)})")
            elif storage.digest(with_content) != digest:
                found.append(f"{name} does not match its digest ({self.blob(digest)})")
            seen(digest)
        return found
