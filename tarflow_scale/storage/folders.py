"""Folders: list, walk, create with shared permissions, remove."""

import errno
import os
import shutil
import stat
import time
import uuid
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from tarflow_scale.storage.paths import PARTIAL, explained, filesystem, is_remote, local

_ABANDONED_SECONDS = 3600.0


def _fresh_filesystem(location: str) -> tuple[Any, str]:
    """The file system of a URL, with its cache of listings cleared, and the path in it."""
    fs, path = filesystem(location)
    fs.invalidate_cache()
    return fs, path


def exists(location: str) -> bool:
    """Whether a file or folder exists."""
    with explained(location, "read"):
        if is_remote(location):
            fs, path = _fresh_filesystem(location)
            return bool(fs.exists(path))
        return local(location).exists()


def list_names(location: str) -> list[str]:
    """Sorted names directly below a folder; empty if the folder does not exist."""
    with explained(location, "list"):
        if is_remote(location):
            fs, path = _fresh_filesystem(location)
            if not fs.exists(path):
                return []
            return sorted(str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(path, detail=False))
        folder = local(location)
        return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []


def list_sizes(location: str) -> dict[str, int]:
    """Sizes in bytes of the files directly below a folder, by name; one request if the store lists sizes."""
    with explained(location, "list"):
        if is_remote(location):
            fs, path = _fresh_filesystem(location)
            entries = fs.ls(path, detail=True)
            return {str(e["name"]).rsplit("/", 1)[-1]: int(e["size"]) for e in entries if e["type"] == "file"}
        with os.scandir(local(location)) as entries:
            sizes: dict[str, int] = {}
            for entry in entries:
                with suppress(FileNotFoundError):  # another writer renamed or removed it after the listing
                    if entry.is_file():
                        sizes[entry.name] = entry.stat().st_size
            return sizes


def is_folder(location: str) -> bool:
    """Whether a folder exists; in an object store, whether there is any object below it."""
    with explained(location, "read"):
        if is_remote(location):
            fs, path = _fresh_filesystem(location)
            return bool(fs.isdir(path))
        return local(location).is_dir()


class FoundFile(NamedTuple):
    """A file below a folder: its relative path, its size, and a string that changes when the file is rewritten."""

    name: str
    num_bytes: int
    version: str


def walk(location: str) -> list[FoundFile]:
    """Every file below a folder, sorted by path. Links are followed, except links to a folder that contains them.

    Raises:
        StorageError: a folder cannot be read.
    """
    with explained(location, "list"):
        if is_remote(location):
            fs, path = _fresh_filesystem(location)
            root = path.strip("/")
            return sorted(
                FoundFile(str(e["name"]).strip("/").removeprefix(root).lstrip("/"), int(e["size"]), _version(e))
                for e in fs.find(path, detail=True).values()
            )
        return sorted(_walk(local(location), "", ()))


def _version(entry: dict[str, Any]) -> str:
    keys = ("ETag", "etag", "md5Hash", "LastModified", "updated", "mtime", "created")
    return str(next((entry[key] for key in keys if entry.get(key)), ""))


def _walk(folder: Path, prefix: str, above: tuple[tuple[int, int], ...]) -> Generator[FoundFile]:
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:  # a link to a folder that contains it
        return
    for entry in os.scandir(folder):
        if entry.is_dir():
            yield from _walk(Path(entry.path), f"{prefix}{entry.name}/", (*above, here))
        elif entry.is_file():
            status = entry.stat()
            yield FoundFile(f"{prefix}{entry.name}", status.st_size, str(status.st_mtime_ns))


def make_folder(folder: Path, shared: int = 0) -> None:
    """Create a local folder and its missing parents.

    A shared folder gets its mode under a temporary name and is then renamed, so a killed writer never leaves a folder
    that other users cannot enter.

    Args:
        folder: the folder; an existing folder is not changed.
        shared: permission bits for other users, see `share`; 0 leaves the modes to the umask.
    """
    if not shared:
        folder.mkdir(parents=True, exist_ok=True)
        return
    if folder.is_dir():
        return
    make_folder(folder.parent, shared)
    staged = folder.parent / f".{uuid.uuid4().hex}{PARTIAL}"
    staged.mkdir()
    try:
        share(staged, shared)
        staged.rename(folder)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # these mean that another writer created the folder
            raise
    finally:
        with suppress(FileNotFoundError):  # after the rename
            staged.rmdir()


def share(path: Path, bits: int) -> None:
    """Add permission bits to a local file or folder, independent of the umask.

    Args:
        path: the file or folder.
        bits: for example, ``0o060`` lets the group read and write. A folder also gets the permission to enter it, and
            the set-group-ID bit, so that new files in it belong to the same group.
    """
    if not bits:
        return
    mode = path.stat().st_mode
    wanted = mode | bits
    if stat.S_ISDIR(mode):
        wanted |= stat.S_ISGID | (bits & 0o444) >> 2
    if wanted != mode:
        path.chmod(stat.S_IMODE(wanted))


def remove_abandoned(location: str) -> None:
    """Remove temporary files that killed writers left directly below a folder, if they are older than an hour."""
    if is_remote(location):
        return  # an object store has no temporary files
    with explained(location, "delete"):
        for staged in local(location).glob(f".*{PARTIAL}"):
            with suppress(FileNotFoundError):  # its writer renamed it, or another process removed it
                if time.time() - staged.stat().st_mtime > _ABANDONED_SECONDS:
                    staged.unlink()


def remove_tree(location: str) -> None:
    """Delete a folder and everything below it, if it exists."""
    with explained(location, "delete"):
        if is_remote(location):
            fs, path = filesystem(location)
            if fs.exists(path):
                fs.rm(path, recursive=True)
            return
        if local(location).exists():
            shutil.rmtree(local(location))
