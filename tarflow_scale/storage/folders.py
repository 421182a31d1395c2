"""What is in a folder, and how a folder is made that others may write to."""

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

__all__ = [
    "FoundFile",
    "exists",
    "is_folder",
    "list_names",
    "list_sizes",
    "make_folder",
    "remove_abandoned",
    "remove_tree",
    "share",
    "walk",
]

_ABANDONED_SECONDS = 3600.0


def _looked_at_again(location: str) -> tuple[Any, str]:
    """The file system of a URL, without what it remembers of listings, and the path in it."""
    fs, path = filesystem(location)
    fs.invalidate_cache()
    return fs, path


def exists(location: str) -> bool:
    """Whether a file or folder is there."""
    with explained(location, "read"):
        if is_remote(location):
            fs, path = _looked_at_again(location)
            return bool(fs.exists(path))
        return local(location).exists()


def list_names(location: str) -> list[str]:
    """Sorted names directly below a folder; empty when there is no such folder."""
    with explained(location, "list"):
        if is_remote(location):
            fs, path = _looked_at_again(location)
            if not fs.exists(path):
                return []
            return sorted(str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(path, detail=False))
        folder = local(location)
        return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []


def list_sizes(location: str) -> dict[str, int]:
    """Sizes in bytes of the files directly below a folder, by name; one request where a store lists sizes."""
    with explained(location, "list"):
        if is_remote(location):
            fs, path = _looked_at_again(location)
            entries = fs.ls(path, detail=True)
            return {str(e["name"]).rsplit("/", 1)[-1]: int(e["size"]) for e in entries if e["type"] == "file"}
        with os.scandir(local(location)) as entries:
            found: dict[str, int] = {}
            for entry in entries:
                with suppress(FileNotFoundError):  # renamed or removed by another writer meanwhile
                    if entry.is_file():
                        found[entry.name] = entry.stat().st_size
            return found


def is_folder(location: str) -> bool:
    """Whether there is a folder; in an object store, whether there are names below."""
    with explained(location, "read"):
        if is_remote(location):
            fs, path = _looked_at_again(location)
            return bool(fs.isdir(path))
        return local(location).is_dir()


class FoundFile(NamedTuple):
    """A file below a folder: its relative path, size in bytes, and what changes when it is written again."""

    name: str
    num_bytes: int
    version: str


def walk(location: str) -> list[FoundFile]:
    """Every file below a folder, sorted by path. Links are followed, but into no folder that lies above them.

    Raises:
        StorageError: a folder cannot be read.
    """
    with explained(location, "list"):
        if is_remote(location):
            fs, path = _looked_at_again(location)
            root = path.strip("/")
            found = fs.find(path, detail=True).values()
            return sorted(
                FoundFile(str(e["name"]).strip("/").removeprefix(root).lstrip("/"), int(e["size"]), _version(e))
                for e in found
            )
        return sorted(_walk(local(location), "", ()))


def _version(entry: dict[str, Any]) -> str:
    keys = ("ETag", "etag", "md5Hash", "LastModified", "updated", "mtime", "created")
    return str(next((entry[key] for key in keys if entry.get(key)), ""))


def _walk(folder: Path, prefix: str, above: tuple[tuple[int, int], ...]) -> Generator[FoundFile]:
    facts = folder.stat()
    here = (facts.st_dev, facts.st_ino)
    if here in above:  # a link that leads back up
        return
    for entry in os.scandir(folder):
        if entry.is_dir():
            yield from _walk(Path(entry.path), f"{prefix}{entry.name}/", (*above, here))
        elif entry.is_file():
            found = entry.stat()
            yield FoundFile(f"{prefix}{entry.name}", found.st_size, str(found.st_mtime_ns))


def make_folder(folder: Path, shared: int = 0) -> None:
    """Make a local folder and the missing ones above it.

    A shared folder is renamed to its name when it has its mode, so a writer that is killed leaves none that locks
    others out.

    Args:
        folder: the folder; one that is there stays as it is.
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
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # these mean that another writer was faster
            raise
    finally:
        with suppress(FileNotFoundError):  # it was renamed
            staged.rmdir()


def share(path: Path, bits: int) -> None:
    """Add permission bits to a local file or folder, whatever the umask of this process is.

    Args:
        path: the file or folder.
        bits: ``0o060`` lets its group read and write. A folder can then also be entered, and hands its group on to
            what is made in it (set-group-ID).
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
    """Remove what writers that were killed left directly below a folder: temporary files older than an hour."""
    if is_remote(location):
        return  # an object store shows whole files alone
    with explained(location, "delete"):
        for staged in local(location).glob(f".*{PARTIAL}"):
            with suppress(FileNotFoundError):  # its writer lives after all, or another was faster
                if time.time() - staged.stat().st_mtime > _ABANDONED_SECONDS:
                    staged.unlink()


def remove_tree(location: str) -> None:
    """Delete a folder and all below it if it exists."""
    with explained(location, "delete"):
        if is_remote(location):
            fs, path = filesystem(location)
            if fs.exists(path):
                fs.rm(path, recursive=True)
            return
        if local(location).exists():
            shutil.rmtree(local(location))
