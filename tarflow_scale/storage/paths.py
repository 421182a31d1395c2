"""Where things are: local paths and URLs, the file system behind a URL, and errors that name the location."""

import errno
import os
import pwd
import re
import stat
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tarflow_scale.errors import StorageError, UserError, install_extra

__all__ = [
    "PARTIAL",
    "base_name",
    "described",
    "explained",
    "filesystem",
    "group_of",
    "is_remote",
    "join",
    "local",
    "local_name",
]

PARTIAL = ".partial"
"""End of the name of a local file that is being written."""
_URL = re.compile(r"^[a-z][a-z0-9+.-]*://")


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


def base_name(location: str) -> str:
    """Last part of a path or URL; of a relative path like ``.``, the folder's real name."""
    name = location.rstrip("/").rsplit("/", 1)[-1]
    return name if is_remote(location) or name not in ("", ".", "..", "~") else local(location).resolve().name


def local(location: str) -> Path:
    """A local location as a path."""
    return Path(local_name(location))


def local_name(location: str) -> str:
    """The same as a string.

    Raises:
        StorageError: it begins with the home folder of a user who has none, as in many containers; the locale cannot
            encode it.
    """
    name = os.path.expanduser(location.removeprefix("file://"))  # noqa: PTH111
    if name.startswith("~"):
        user = name[1:].partition("/")[0] or os.getuid()
        raise StorageError(f"{location} must begin with a home folder (got none of user {user}); write the whole path")
    try:
        os.fsencode(name)
    except UnicodeEncodeError as error:
        letter = error.object[error.start]
        raise StorageError(f"{location} must have letters of the locale (got {letter!r}); set LC_ALL=C.UTF-8") from None
    return name


def filesystem(location: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it."""
    import fsspec  # here, because it costs a tenth of a second and local runs never need it

    try:
        return fsspec.core.url_to_fs(location, **_patience(location))
    except ValueError as error:
        raise StorageError(f"no file system for {location} ({error}); use a path, or a URL of fsspec") from error
    except ImportError as error:
        raise StorageError(
            f"no file system for {location} ({error}); install that package, for S3 by {install_extra('s3')}"
        ) from error


def _patience(location: str) -> dict[str, Any]:
    """How long a client of S3 waits for a store that answers 503: about a minute, unless something else is configured.

    Its own default is five attempts, which a store that is busy for some seconds can outlast.
    """
    from fsspec.config import conf

    configured = any("config_kwargs" in conf.get(name, {}) for name in ("s3", "s3a"))
    if (
        not location.startswith(("s3://", "s3a://"))
        or configured
        or {"AWS_MAX_ATTEMPTS", "AWS_RETRY_MODE"} & {*os.environ}
    ):
        return {}
    return {"config_kwargs": {"retries": {"mode": "standard", "max_attempts": 10}}}


@contextmanager
def explained(location: str, verb: str, of_store: bool = True) -> Generator[None]:
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
        if isinstance(error, PermissionError) and not is_remote(location):
            reason += _denied_by(error, local(location), verb)
        raise StorageError(f"cannot {verb} {location} ({reason}); check the path, permissions and space") from error
    except Exception as error:
        if not (of_store and is_remote(location)):
            raise
        raise StorageError(f"cannot {verb} {location} ({_words(error)}); check the URL and credentials") from error


def _denied_by(error: PermissionError, place: Path, verb: str) -> str:
    """Mode and owner of what denied an access, to add to the error: the file, or the folder it is in or would be in."""
    place = (Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else place).absolute()
    if verb in ("write", "delete") and error.errno == errno.EACCES:  # which the folder decides
        place = place.parent
    for one in (place, *place.parents):
        try:
            return f": {one} is {described(one)}"
        except OSError:  # it is in a folder that cannot be entered, or not there yet
            continue
    return ""


def described(path: Path) -> str:
    """Mode and owner of a local file or folder, as in ``drwxr-x--- of alice:team``."""
    facts = path.stat()
    try:
        owner = pwd.getpwuid(facts.st_uid).pw_name
    except KeyError:  # as in a container that has no name for it
        owner = str(facts.st_uid)
    return f"{stat.filemode(facts.st_mode)} of {owner}:{group_of(path)}"


def group_of(path: Path) -> str:
    """Name of the group of a local file or folder, or its number where it has none."""
    try:
        return path.group()
    except KeyError:
        return str(path.stat().st_gid)


def _words(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
