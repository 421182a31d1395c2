"""Local path or URL alike: read, list, write atomically, create if absent. The only user of fsspec.

A location is a local path or an fsspec URL (``s3://bucket/run``). What a reader can open is always whole: local
files are written beside their final name, flushed to disk and renamed; object stores publish an object when its
upload completes. ``create`` lets exactly one of many writers win.
"""

import hashlib
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from tarflow_scale.errors import StorageError, UserError

__all__ = [
    "FoundFile",
    "base_name",
    "copy_file",
    "create",
    "digest",
    "exists",
    "is_folder",
    "is_remote",
    "join",
    "list_names",
    "list_sizes",
    "local_copy",
    "open_seekable",
    "read_bytes",
    "read_range",
    "remove",
    "remove_tree",
    "size_bytes",
    "walk",
    "write_bytes",
    "writing",
]

_URL = re.compile(r"^[a-z][a-z0-9+.-]*://")
_COPY_BYTES = 1 << 22


def is_remote(location: str) -> bool:
    """Whether ``location`` is a URL rather than a local path."""
    return bool(_URL.match(location)) and not location.startswith("file://")


def join(location: str, *parts: str) -> str:
    """``location/part/part``; a part may not climb out of its parent.

    Raises:
        StorageError: when a part is absolute or contains ``..``.
    """
    for part in parts:
        if part.startswith("/") or ".." in part.split("/") or "\0" in part:
            raise StorageError(f"a name may not leave its folder (got {part!r}); use a plain relative name")
    return "/".join([location.rstrip("/") or "/", *parts])


def read_bytes(location: str) -> bytes:
    """The whole content.

    Raises:
        StorageError: when it is missing or unreadable.
    """
    with _explained(location, "read"):
        if is_remote(location):
            fs, path = _filesystem(location)
            return cast(bytes, fs.cat_file(path))
        return _local(location).read_bytes()


def read_range(location: str, start: int, stop: int) -> bytes:
    """Bytes ``[start, stop)``; shorter where the file is."""
    with _explained(location, "read"):
        if is_remote(location):
            fs, path = _filesystem(location)
            return cast(bytes, fs.cat_file(path, start=start, end=stop))
        handle = os.open(_local_name(location), os.O_RDONLY)  # the loader's, so without the cost of a Path
        try:
            return os.pread(handle, stop - start, start)
        finally:
            os.close(handle)


def size_bytes(location: str) -> int:
    """Size of a file.

    Raises:
        StorageError: when it is missing.
    """
    with _explained(location, "read"):
        if is_remote(location):
            fs, path = _filesystem(location)
            return int(fs.info(path)["size"])
        return _local(location).stat().st_size


def exists(location: str) -> bool:
    """Whether a file or folder is there."""
    with _explained(location, "read"):
        if is_remote(location):
            fs, path = _filesystem(location)
            fs.invalidate_cache()
            return bool(fs.exists(path))
        return _local(location).exists()


def list_names(location: str) -> list[str]:
    """Sorted names directly below a folder; empty when there is no such folder."""
    with _explained(location, "list"):
        if is_remote(location):
            fs, path = _filesystem(location)
            fs.invalidate_cache()
            if not fs.exists(path):
                return []
            return sorted(str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(path, detail=False))
        folder = _local(location)
        return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []


def list_sizes(location: str) -> dict[str, int]:
    """Sizes in bytes of the files directly below a folder, by name; one request where a store lists sizes."""
    with _explained(location, "list"):
        if is_remote(location):
            fs, path = _filesystem(location)
            fs.invalidate_cache()
            entries = fs.ls(path, detail=True)
            return {str(e["name"]).rsplit("/", 1)[-1]: int(e["size"]) for e in entries if e["type"] == "file"}
        with os.scandir(_local(location)) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}


def is_folder(location: str) -> bool:
    """Whether there is a folder; in an object store, whether there are names below."""
    with _explained(location, "read"):
        if is_remote(location):
            fs, path = _filesystem(location)
            fs.invalidate_cache()
            return bool(fs.isdir(path))
        return _local(location).is_dir()


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
    with _explained(location, "list"):
        if is_remote(location):
            fs, path = _filesystem(location)
            fs.invalidate_cache()
            root = path.strip("/")
            found = fs.find(path, detail=True).values()
            return sorted(
                FoundFile(str(e["name"]).strip("/").removeprefix(root).lstrip("/"), int(e["size"]), _version(e))
                for e in found
            )
        return sorted(_walk(_local(location), "", ()))


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


def open_seekable(location: str) -> IO[bytes]:
    """A file to read from and seek in; of a remote one, only what is read is fetched."""
    with _explained(location, "read"):
        if is_remote(location):
            fs, path = _filesystem(location)
            return cast(IO[bytes], fs.open(path, "rb"))
        return _local(location).open("rb")


def base_name(location: str) -> str:
    """Last part of a path or URL; of a relative path like ``.``, the folder's real name."""
    name = location.rstrip("/").rsplit("/", 1)[-1]
    return name if is_remote(location) or name not in ("", ".", "..", "~") else _local(location).resolve().name


@contextmanager
def writing(location: str) -> Generator[IO[bytes]]:
    """A binary file that appears under ``location``, whole, when the block ends, and not at all if it raises."""
    with _explained(location, "write", of_store=False):  # what the caller's block raises is its own
        target = _local(location) if not is_remote(location) else None
        folder = target.parent if target else Path(tempfile.mkdtemp(prefix="tarflow-scale-"))
        folder.mkdir(parents=True, exist_ok=True)
        staged = folder / f".{uuid.uuid4().hex}.partial"
        try:
            with staged.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if target:
                staged.replace(target)
                _sync_folder(folder)
            else:
                with _explained(location, "write"):
                    fs, path = _filesystem(location)
                    fs.put_file(str(staged), path)
        finally:
            staged.unlink(missing_ok=True)
            if target is None:
                shutil.rmtree(folder, ignore_errors=True)


def write_bytes(location: str, content: bytes) -> None:
    """Write or replace a file atomically."""
    with writing(location) as file:
        file.write(content)


def copy_file(source: str, target: str) -> None:
    """Copy a local file; what appears under ``target`` is whole."""
    with _explained(target, "write"):
        if is_remote(target):
            fs, path = _filesystem(target)
            fs.put_file(str(_local(source)), path)
            return
    with _local(source).open("rb") as file, writing(target) as copy:
        shutil.copyfileobj(file, copy, _COPY_BYTES)


def create(location: str, content: bytes) -> bool:
    """Create a file unless it exists; of any number of concurrent writers exactly one gets True.

    Local: a flushed temporary file is hard-linked to the final name, which fails if that exists. Object stores:
    a conditional put. The content must not be empty, because some stores make an empty put unconditional.
    """
    assert content, "create() needs content"
    with _explained(location, "write"):
        if is_remote(location):
            fs, path = _filesystem(location)
            try:
                fs.pipe_file(path, content, mode="create")
            except FileExistsError:
                return False
            return True
        target = _local(location)
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = target.parent / f".{uuid.uuid4().hex}.partial"
        try:
            with staged.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.link(staged, target)
        except FileExistsError:
            return False
        finally:
            staged.unlink(missing_ok=True)
        _sync_folder(target.parent)
        return True


def remove(location: str) -> None:
    """Delete a file if it exists."""
    with _explained(location, "delete"):
        if is_remote(location):
            fs, path = _filesystem(location)
            if fs.exists(path):
                fs.rm_file(path)
            return
        _local(location).unlink(missing_ok=True)


def remove_tree(location: str) -> None:
    """Delete a folder and all below it if it exists."""
    with _explained(location, "delete"):
        if is_remote(location):
            fs, path = _filesystem(location)
            if fs.exists(path):
                fs.rm(path, recursive=True)
            return
        if _local(location).exists():
            shutil.rmtree(_local(location))


@contextmanager
def local_copy(location: str) -> Generator[Path]:
    """The file as a local path: itself, or a temporary copy of a remote one."""
    if not is_remote(location):
        yield _local(location)
        return
    with tempfile.TemporaryDirectory(prefix="tarflow-scale-") as folder:
        copy = Path(folder) / location.rsplit("/", 1)[-1]
        with _explained(location, "read"):
            fs, path = _filesystem(location)
            fs.get_file(path, str(copy))
        yield copy


def digest(source: bytes | Path) -> str:
    """SHA-256 of bytes or of a local file, as lower-case hex."""
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    state = hashlib.sha256()
    with source.open("rb") as file:
        while block := file.read(_COPY_BYTES):
            state.update(block)
    return state.hexdigest()


def _local(location: str) -> Path:
    return Path(_local_name(location))


def _local_name(location: str) -> str:
    return os.path.expanduser(location.removeprefix("file://"))  # noqa: PTH111


def _filesystem(location: str) -> tuple[Any, str]:
    import fsspec  # here, because it costs a tenth of a second and local runs never need it

    try:
        return fsspec.core.url_to_fs(location)
    except (ImportError, ValueError) as error:
        raise StorageError(f"no file system for {location} ({error}); install the extra for it, e.g. [s3]") from error


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _explained(location: str, verb: str, of_store: bool = True) -> Generator[None]:
    """Turn an operating-system or store error into one line that names the location.

    Clients of stores raise what their libraries do (botocore, aiohttp, google), so every failure of a store counts.
    """
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise StorageError(f"cannot {verb} {location} (no such file); check the path") from error
    except OSError as error:
        reason = error.strerror or _words(error)
        raise StorageError(f"cannot {verb} {location} ({reason}); check the path, permissions and space") from error
    except Exception as error:
        if not (of_store and is_remote(location)):
            raise
        raise StorageError(f"cannot {verb} {location} ({_words(error)}); check the URL and credentials") from error


def _words(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
