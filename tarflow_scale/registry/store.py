"""The part of a registry that all its models share: blobs, and the settings in ``registry.json``.

``<registry>/blobs/sha256/<hex>`` stores every file once. ``<registry>/registry.json`` records how writers create
events: by create-if-absent, after a test showed that the store supports it; or by check-then-write, if the user
promised that there is only one writer. It also records which file modes every writer sets, like git's
``core.sharedRepository``.
"""

import stat
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from pydantic import Field

from tarflow_scale import storage
from tarflow_scale.errors import NotExclusive, RegistryError, StorageError
from tarflow_scale.records import FileRecord, Record

__all__ = ["Marker", "Store"]

_BLOBS = "blobs"
_MARKER = "registry.json"
_FORMAT = 1
_PROBE = ".probe"
_WRITERS, _KEYS = 8, 100
_BITS = {"umask": 0, "group": 0o060, "all": 0o064}
"""Permission bits that are set on files even if the umask removes them; see `storage.share` for folders."""
FRESH_SECONDS = 3600.0
"""An existing blob older than this is written again before an event names it, so that it is not collected."""


class Marker(Record):
    """Content of ``registry.json``."""

    format: int = Field(ge=1)
    single_writer: bool = False
    """The user promised that only one process writes, so events are created by check-then-write."""
    checked: str = ""
    """Description of the test of create-if-absent."""
    shared: Literal["umask", "group", "all"] = "umask"
    """Who else may use the files. ``umask``: the umask of each writer decides. ``group``: the group of the folder may
    read and write. ``all``: in addition, all users may read."""


class Store:
    """The part of a registry that all its models share.

    Args:
        path: folder or URL of the registry.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._marker: Marker | None = None

    # -- create-if-absent ----------------------------------------------------------------------------------------------

    def marker(self) -> Marker | None:
        """Content of ``registry.json``; None if there is no such file yet.

        Raises:
            RegistryError: a later release of this package wrote the file.
        """
        if self._marker is None or not storage.is_remote(self.path):  # `init` may change modes of a local registry
            location = storage.join(self.path, _MARKER)
            content = storage.read_if_there(location)
            if content is not None:
                marker = Marker.from_json(content, location)
                if marker.format > _FORMAT:
                    raise RegistryError(
                        f"{self.path} has registry format {marker.format} (this version of tarflow-scale reads format "
                        f"{_FORMAT}); upgrade tarflow-scale"
                    )
                self._marker = marker
        return self._marker

    def init(self, single_writer: bool = False, shared: Literal["umask", "group", "all"] = "umask") -> Marker:
        """Test create-if-absent and write ``registry.json``; for an existing registry, only add permission bits.

        Args:
            single_writer: the user promises that only one process writes, so create-if-absent is not tested.
            shared: who may use the files, see `Marker`. In an existing registry, missing permission bits are added to
                the files and folders of this user; no bits are removed.

        Raises:
            RegistryError: the test of create-if-absent failed, the store has no file modes, or other users own files
                that must be shared.
        """
        marker, bits = self.marker(), _BITS[shared]
        if bits:
            self._share_root(bits)
        if marker is None:
            checked = "" if single_writer else self.probe()
            marker = self._mark(Marker(format=_FORMAT, single_writer=single_writer, checked=checked, shared=shared))
        if bits and marker.shared != shared:
            marker = marker.model_copy(update={"shared": shared})
            storage.write_bytes(storage.join(self.path, _MARKER), marker.to_json(), bits)
            self._marker = marker
        if bits:
            self._share_all(bits)
        return marker

    def _share_root(self, bits: int) -> None:
        """Create the folder with shared modes, and check that its file system keeps the modes."""
        if storage.is_remote(self.path):
            raise RegistryError(
                f"command.shared must be used with a local folder (got {self.path}); set the permissions in the object "
                f"store"
            )
        root = storage.local(self.path)
        with storage.explained(self.path, "write"):
            storage.make_folder(root, bits)
            try:
                storage.share(root, bits)
            except PermissionError as error:
                raise RegistryError(
                    f"{self.path} must be writable by its group and have the set-group-ID bit (got "
                    f"{storage.described(root)}); let its owner run this command or chmod g+rwxs"
                ) from error
            mode = root.stat().st_mode
            if mode & bits != bits:
                raise RegistryError(
                    f"{self.path} must be on a file system that keeps modes (got {storage.described(root)} after "
                    f"chmod); remove command.shared, and set the modes in the mount options"
                )
            if not mode & stat.S_ISGID:
                warnings.warn(
                    f"{self.path} does not keep the set-group-ID bit ({storage.described(root)} after chmod g+s); "
                    f"files of other users may belong to their own groups",
                    stacklevel=3,
                )

    def _share_all(self, bits: int) -> None:
        """Set the modes of all existing files and folders.

        Raises:
            RegistryError: other users own some of the files; each of them must run the same command.
        """
        not_owned: list[Path] = []
        for path in sorted(storage.local(self.path).rglob("*")):
            try:
                storage.share(path, bits)
            except PermissionError:
                not_owned.append(path)
            except FileNotFoundError:
                continue  # a temporary file that its writer removed meanwhile
        if not_owned:
            raise RegistryError(
                f"{len(not_owned)} files and folders of {self.path} can be shared only by their owners (first: "
                f"{not_owned[0]} is {storage.described(not_owned[0])}); let each owner run the same command"
            )

    def probe(self, num_keys: int = _KEYS) -> str:
        """Test create-if-absent: many threads create the same names at once. Returns a description of the test.

        Raises:
            RegistryError: several threads created the same name.
        """
        with _or_one_writer():
            winners = self._winners(num_keys)
        if winners > num_keys:
            raise RegistryError(
                f"{self.path} does not support create-if-absent ({_WRITERS} writers competed for {num_keys} names, and "
                f"{winners} creations succeeded); use a store that supports it, or set command.single_writer=true if "
                f"only one process writes"
            )
        return f"{_WRITERS} writers, {num_keys} names, {winners} winners"

    def create(self, location: str, content: bytes) -> bool:
        """Create a file unless it exists; exactly one of several concurrent writers gets True."""
        return self._create(location, content, self.marker() or self._first_write())

    def replace(self, location: str, content: bytes) -> None:
        """Write or replace a file, with the modes of this registry."""
        marker = self.marker()
        storage.write_bytes(location, content, _BITS[marker.shared] if marker else 0)

    def _create(self, location: str, content: bytes, marker: Marker) -> bool:
        bits = _BITS[marker.shared]
        if not marker.single_writer:
            with _or_one_writer():
                return storage.create(location, content, bits)
        if storage.exists(location):
            return False
        storage.write_bytes(location, content, bits)
        return True

    def _first_write(self) -> Marker:
        """Create ``registry.json``. For a local registry, creating this file is the only test of create-if-absent."""
        return self.init() if storage.is_remote(self.path) else self._mark(Marker(format=_FORMAT))

    def _mark(self, marker: Marker) -> Marker:
        self._create(storage.join(self.path, _MARKER), marker.to_json(), marker)
        self._marker = None
        written = self.marker()
        assert written is not None
        return written

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
                return 0  # another writer failed, and raises its own error
            except BaseException:
                barrier.abort()  # otherwise the other writers would wait for this one
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
        """Path or URL of the blob with this SHA-256."""
        return storage.join(self.path, _BLOBS, "sha256", digest)

    def blobs(self) -> dict[str, int]:
        """Size in bytes of every blob, by digest."""
        folder = storage.join(self.path, _BLOBS, "sha256")
        return storage.list_sizes(folder) if storage.exists(folder) else {}

    def keep(self, content: bytes) -> FileRecord:
        """Store content as a blob, and return its record, which an event can contain."""
        if self.marker() is None:
            self._first_write()  # before any blob, because it may refuse the store
        record = FileRecord(sha256=storage.digest(content), bytes=len(content))
        location = self.blob(record.sha256)
        written = storage.modified_seconds(location)
        if written is None or time.time() - written > FRESH_SECONDS:
            self.replace(location, content)
        return record

    def read(self, name: str, record: FileRecord) -> bytes:
        """Read a blob and verify its digest; error messages call the blob ``name``.

        Raises:
            RegistryError: the blob is missing or does not match its digest.
        """
        location = self.blob(record.sha256)
        content = storage.read_if_there(location)
        if content is None:
            raise RegistryError(f"{name} is missing from the registry ({location}); restore this file from a backup")
        if storage.digest(content) != record.sha256:
            raise RegistryError(f"{name} does not match its digest ({location}); restore this file from a backup")
        return content

    def problems(self, needed: dict[str, str], seen: Callable[[str], None]) -> list[str]:
        """Read blobs and verify their digests. Returns a line for every missing or damaged blob.

        Args:
            needed: description of each blob, by digest.
            seen: function that is called with the digest of every checked blob.
        """
        lines: list[str] = []
        for digest, name in sorted(needed.items()):
            try:
                content = storage.read_if_there(self.blob(digest))
                if content is None:
                    lines.append(f"{name} is missing ({self.blob(digest)})")
                elif storage.digest(content) != digest:
                    lines.append(f"{name} does not match its digest ({self.blob(digest)})")
            except StorageError as error:
                lines.append(f"{name}: {error}")
            seen(digest)
        return lines


@contextmanager
def _or_one_writer() -> Generator[None]:
    """If the file system has no create-if-absent, add advice on ``command.single_writer`` to the error."""
    try:
        yield
    except NotExclusive as error:
        raise RegistryError(f"{error}, or set command.single_writer=true if only one process writes") from error
