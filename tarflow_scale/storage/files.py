"""Files: read in whole or in part, write atomically, create if absent."""

import ctypes
import errno
import hashlib
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TypeVar, cast

from tarflow_scale.errors import NotExclusive, StorageError
from tarflow_scale.storage.folders import make_folder, share
from tarflow_scale.storage.paths import PARTIAL, explained, filesystem, is_remote, local, local_name

_COPY_BYTES = 1 << 22
_UNSUPPORTED = {errno.EPERM, errno.ENOSYS, errno.EINVAL, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP}
"""Error codes of a file system that does not support hard links, or does not support RENAME_NOREPLACE."""
_AT_FDCWD, _RENAME_NOREPLACE = -100, 1
T = TypeVar("T")


def retrying(call: Callable[[], T], attempts: int, first_wait_seconds: float) -> T:
    """Call ``call`` until it raises no `StorageError`, and return its result; the wait doubles after every attempt.

    Raises:
        StorageError: the last attempt failed.
    """
    for attempt in range(attempts - 1):
        try:
            return call()
        except StorageError:
            time.sleep(first_wait_seconds * 2**attempt)
    return call()


def read_bytes(location: str) -> bytes:
    """The whole content of a file.

    Raises:
        StorageError: the file is missing or cannot be read.
    """
    content = read_if_there(location)
    if content is None:
        raise StorageError(f"cannot read {location} (no such file); check the path")
    return content


def read_if_there(location: str) -> bytes | None:
    """The whole content of a file, or None if the file does not exist. Makes one request."""
    with explained(location, "read"):
        try:
            if is_remote(location):
                fs, path = filesystem(location)
                return cast(bytes, fs.cat_file(path))
            return local(location).read_bytes()
        except FileNotFoundError:
            return None


def read_many(locations: list[str]) -> list[bytes]:
    """The contents of several files of one store, in order; requests to a remote store are concurrent.

    Raises:
        StorageError: a file is missing or cannot be read.
    """
    if not locations or not is_remote(locations[0]):
        return [read_bytes(location) for location in locations]
    with explained(locations[0], "read"):
        fs, _ = filesystem(locations[0])
        paths = [filesystem(location)[1] for location in locations]
        contents = fs.cat(paths)
        return [cast(bytes, content) for content in (contents.values() if isinstance(contents, dict) else [contents])]


def read_range(location: str, start: int, stop: int) -> bytes:
    """Bytes ``[start, stop)`` of a file; fewer if the file ends before ``stop``."""
    with explained(location, "read"):
        if is_remote(location):
            fs, path = filesystem(location)
            return cast(bytes, fs.cat_file(path, start=start, end=stop))
        handle = os.open(local_name(location), os.O_RDONLY)  # the loader calls this often, so it makes no Path
        try:
            return os.pread(handle, stop - start, start)
        finally:
            os.close(handle)


def size_bytes(location: str) -> int:
    """Size of a file.

    Raises:
        StorageError: the file is missing.
    """
    with explained(location, "read"):
        if is_remote(location):
            fs, path = filesystem(location)
            return int(fs.info(path)["size"])
        return local(location).stat().st_size


def modified_seconds(location: str) -> float | None:
    """Time of the last write to a file, in seconds since 1970; None if the file does not exist.

    Raises:
        StorageError: the store does not report this time.
    """
    with explained(location, "read"):
        try:
            if is_remote(location):
                fs, path = filesystem(location)
                fs.invalidate_cache()
                return float(fs.modified(path).timestamp())
            return local(location).stat().st_mtime
        except FileNotFoundError:
            return None


def open_seekable(location: str) -> IO[bytes]:
    """Open a file for random access. If the file is remote, only the parts that are read are transferred."""
    with explained(location, "read"):
        if is_remote(location):
            fs, path = filesystem(location)
            return cast(IO[bytes], fs.open(path, "rb"))
        return local(location).open("rb")


@contextmanager
def local_copy(location: str) -> Generator[Path]:
    """Local path of a file. A remote file is copied to a temporary file for the duration of the block."""
    if not is_remote(location):
        yield local(location)
        return
    with tempfile.TemporaryDirectory(prefix="tarflow-scale-") as folder:
        copy = Path(folder) / location.rsplit("/", 1)[-1]
        with explained(location, "read"):
            fs, path = filesystem(location)
            fs.get_file(path, str(copy))
        yield copy


@contextmanager
def writing(location: str, shared: int = 0) -> Generator[IO[bytes]]:
    """Open a binary file for writing. It appears at ``location`` when the block ends, unless the block raises an error.

    Args:
        location: local path or URL.
        shared: permission bits for other users, see `share`; 0 leaves the mode to the umask. No effect on a URL.
    """
    with explained(location, "write", of_store=False):  # exceptions of the caller's block pass unchanged
        target = local(location) if not is_remote(location) else None
        folder = target.parent if target else Path(tempfile.mkdtemp(prefix="tarflow-scale-"))
        make_folder(folder, shared)
        staged = folder / f".{uuid.uuid4().hex}{PARTIAL}"
        try:
            with staged.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if target:
                share(staged, shared)
                staged.replace(target)
                _sync_folder(folder)
            else:
                with explained(location, "write"):
                    fs, path = filesystem(location)
                    fs.put_file(str(staged), path)
        finally:
            staged.unlink(missing_ok=True)
            if target is None:
                shutil.rmtree(folder, ignore_errors=True)


def write_bytes(location: str, content: bytes, shared: int = 0) -> None:
    """Write or replace a file atomically; ``shared`` as in `writing`."""
    with writing(location, shared) as file:
        file.write(content)


def copy_file(source: str, target: str) -> None:
    """Copy a local file to ``target`` atomically."""
    with explained(target, "write"):
        if is_remote(target):
            fs, path = filesystem(target)
            fs.put_file(str(local(source)), path)
            return
    with local(source).open("rb") as file, writing(target) as copy:
        shutil.copyfileobj(file, copy, _COPY_BYTES)


def create(location: str, content: bytes, shared: int = 0) -> bool:
    """Create a file unless it exists; return whether it was created. Exactly one of several writers succeeds.

    A local file is written under a temporary name and flushed; then a system call gives it the final name, or fails if
    the name is taken. So a reader never sees part of a file, and a killed writer leaves either no file or the complete
    file. In an object store, the file is created by a conditional put. The content must not be empty, because some
    stores treat an empty conditional put as unconditional.

    Args:
        location: local path or URL.
        content: content of the file.
        shared: as in `writing`.

    Raises:
        NotExclusive: the file system supports no system call that fails if the name is taken.
    """
    assert content, "create() needs content"
    with explained(location, "write"):
        if is_remote(location):
            fs, path = filesystem(location)
            try:
                fs.pipe_file(path, content, mode="create")
            except FileExistsError:
                return False
            return True
        target = local(location)
        make_folder(target.parent, shared)
        staged = target.parent / f".{uuid.uuid4().hex}{PARTIAL}"
        try:
            with staged.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            share(staged, shared)
            _name(staged, target)
        except FileExistsError:
            return False
        finally:
            staged.unlink(missing_ok=True)
        _sync_folder(target.parent)
        return True


def _name(staged: Path, target: Path) -> None:
    """Give a file its final name unless the name is taken; the temporary name may remain.

    This makes a hard link. On file systems without hard links (FAT, CIFS, many FUSE file systems), it renames the file
    with a flag that forbids replacement. Other methods are not safe if the writer is killed: a file that is created
    empty and filled later would stay incomplete, and a lock file would stay locked.

    Raises:
        FileExistsError: the name is taken.
        NotExclusive: the file system supports neither method.
    """
    try:
        os.link(staged, target)
        return
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    try:
        _rename_unless_there(staged, target)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        raise NotExclusive(
            f"{target.parent} must be on a file system with hard links or RENAME_NOREPLACE, so that only one writer "
            f"can create a file (got neither: {error.strerror}); use another file system"
        ) from error


def _rename_unless_there(source: Path, target: Path) -> None:
    """Call Linux's ``renameat2`` with RENAME_NOREPLACE, for which Python has no function.

    Raises:
        OSError: the error of the system call; ENOSYS if the C library does not have it.
    """
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(target))
    old, new = os.fsencode(source), os.fsencode(target)
    if call(_AT_FDCWD, old, _AT_FDCWD, new, ctypes.c_uint(_RENAME_NOREPLACE)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(target))


def remove(location: str) -> None:
    """Delete a file if it exists."""
    with explained(location, "delete"):
        if is_remote(location):
            fs, path = filesystem(location)
            if fs.exists(path):
                fs.rm_file(path)
            return
        local(location).unlink(missing_ok=True)


def digest(source: bytes | Path) -> str:
    """SHA-256 of bytes or of a local file, as lower-case hex."""
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    state = hashlib.sha256()
    with source.open("rb") as file:
        while block := file.read(_COPY_BYTES):
            state.update(block)
    return state.hexdigest()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
