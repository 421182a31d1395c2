"""What all models of a registry share: content-addressed blobs, proof that the store gives one winner, and modes.

``<registry>/blobs/sha256/<hex>`` holds a file once, whoever names it. ``<registry>/registry.json`` says how events are
claimed: by create-if-absent where the store was seen to have it, or by check-then-write where one writer was promised.
It also says for whom every writer sets the modes of files and folders, as git's ``core.sharedRepository`` does.
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
from tarflow_scale.records import FileRecord, Record, canonical_json

__all__ = ["Marker", "Store"]

_BLOBS = "blobs"
_MARKER = "registry.json"
_FORMAT = 1
_PROBE = ".probe"
_WRITERS, _KEYS = 8, 100
_BITS = {"umask": 0, "group": 0o060, "all": 0o064}
"""Permission bits that files get beside those that the umask leaves; see `storage.share` for folders."""
FRESH_SECONDS = 3600.0
"""A blob that is older is written again when something new names it, so that a collector sees that it is wanted."""


class Marker(Record):
    """What ``init`` leaves."""

    format: int = Field(ge=1)
    single_writer: bool = False
    """Events are claimed by check-then-write; whoever set this promised that only one process writes."""
    checked: str = ""
    """How create-if-absent was tried."""
    shared: Literal["umask", "group", "all"] = "umask"
    """Who else may use the files: those whom each writer's umask allows; also the folder's group, to read and write; or
    also all others, to read."""

    def to_json(self) -> bytes:
        """Canonical JSON bytes, without a default that earlier versions of this package do not know."""
        known = self.model_dump(mode="json", exclude={"shared"} if self.shared == "umask" else None)
        return canonical_json(known)


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
        if self._marker is None or not storage.is_remote(self.path):  # `init` may set another mode at any time
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

    def init(self, single_writer: bool = False, shared: Literal["umask", "group", "all"] = "umask") -> Marker:
        """Try whether of many writers one wins, and leave a marker; what is there already stays.

        Args:
            single_writer: somebody promises that only one process writes, so nothing is tried.
            shared: for whom modes are set, see `Marker`. It can be set for a registry that is there: what this user
                owns in it gets the bits that are missing, and none is taken away.

        Raises:
            RegistryError: several won, and ``single_writer`` is not set; the store has no modes; other users own files
                that would have to be shared.
        """
        there, bits = self.marker(), _BITS[shared]
        if bits:
            self._share_root(bits)
        if there is None:
            checked = "" if single_writer else self.probe()
            there = self._mark(Marker(format=_FORMAT, single_writer=single_writer, checked=checked, shared=shared))
        if bits and there.shared != shared:
            there = there.model_copy(update={"shared": shared})
            storage.write_bytes(storage.join(self.path, _MARKER), there.to_json(), bits)
            self._marker = there
        if bits:
            self._share_all(bits)
        return there

    def _share_root(self, bits: int) -> None:
        """Make the folder, for others too, and see that its file system keeps modes."""
        if storage.is_remote(self.path):
            raise RegistryError(
                f"command.shared sets modes of local files (got it for {self.path}); set who may write in the store"
            )
        root = storage.local(self.path)
        with storage.explained(self.path, "write"):
            storage.make_folder(root, bits)
            try:
                storage.share(root, bits)
            except PermissionError as error:
                raise RegistryError(
                    f"{self.path} must let its group write and hand its group on (got {storage.described(root)}); have "
                    f"its owner run this command, or chmod g+rwxs"
                ) from error
            mode = root.stat().st_mode
            if mode & bits != bits:
                raise RegistryError(
                    f"{self.path} must be on a file system that keeps modes (got {storage.described(root)} after "
                    f"chmod); leave out command.shared and set the modes when it is mounted"
                )
            if not mode & stat.S_ISGID:
                warnings.warn(
                    f"{self.path} does not hand its group on ({storage.described(root)} after chmod g+s); what others "
                    f"write may have their own group",
                    stacklevel=3,
                )

    def _share_all(self, bits: int) -> None:
        """Set the modes of what is there.

        Raises:
            RegistryError: some of it belongs to others, who must do this too.
        """
        left: list[Path] = []
        for path in sorted(storage.local(self.path).rglob("*")):
            try:
                storage.share(path, bits)
            except PermissionError:
                left.append(path)
            except FileNotFoundError:
                continue  # a writer's temporary file
        if left:
            raise RegistryError(
                f"{len(left)} files and folders of {self.path} must be shared by their owners (first: {left[0]} is "
                f"{storage.described(left[0])}); have each run the same command"
            )

    def probe(self, num_keys: int = _KEYS) -> str:
        """Have many writers create the same names at once; says what was tried. Nothing of it stays.

        Raises:
            RegistryError: several won one name.
        """
        with _or_one_writer():
            winners = self._winners(num_keys)
        if winners > num_keys:
            raise RegistryError(
                f"{self.path} has no create-if-absent ({winners} of {_WRITERS} writers won {num_keys} names); use a "
                f"store that has it, or promise a single writer with command.single_writer=true"
            )
        return f"{_WRITERS} writers, {num_keys} names, {winners} winners"

    def create(self, location: str, content: bytes) -> bool:
        """Create a file unless it exists; of many writers one gets True."""
        return self._create(location, content, self.marker() or self._first_write())

    def replace(self, location: str, content: bytes) -> None:
        """Write or replace a file, with the mode of this registry."""
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
        """A registry that nobody has initialised: a remote store is tried, and a local one by creating the marker."""
        return self.init() if storage.is_remote(self.path) else self._mark(Marker(format=_FORMAT))

    def _mark(self, marker: Marker) -> Marker:
        self._create(storage.join(self.path, _MARKER), marker.to_json(), marker)
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
        if self.marker() is None:
            self._first_write()  # before any file, because it may refuse the store
        record = FileRecord(sha256=storage.digest(content), bytes=len(content))
        location = self.blob(record.sha256)
        written = storage.modified_seconds(location)
        if written is None or time.time() - written > FRESH_SECONDS:
            self.replace(location, content)
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
            try:
                content = storage.read_if_there(self.blob(digest))
                if content is None:
                    found.append(f"{name} is missing ({self.blob(digest)})")
                elif storage.digest(content) != digest:
                    found.append(f"{name} does not match its digest ({self.blob(digest)})")
            except StorageError as error:
                found.append(f"{name}: {error}")
            seen(digest)
        return found


@contextmanager
def _or_one_writer() -> Generator[None]:
    """Add to an error of a file system what a registry on it can still do."""
    try:
        yield
    except NotExclusive as error:
        raise RegistryError(f"{error}, or promise a single writer with command.single_writer=true") from error
