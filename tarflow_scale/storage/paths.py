"""Local paths and URLs, the file system of a URL, and errors that name the location."""

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

PARTIAL = ".partial"
"""Suffix of a local file while it is being written."""
_URL = re.compile(r"^[a-z][a-z0-9+.-]*://")


def is_remote(location: str) -> bool:
    """Whether ``location`` is a URL rather than a local path."""
    return bool(_URL.match(location)) and not location.startswith("file://")


def join(location: str, *parts: str) -> str:
    """Join a location and parts to ``location/part/part``. A part must not lead out of its folder.

    Raises:
        StorageError: a part is absolute or contains ``..``.
    """
    for part in parts:
        if part.startswith("/") or ".." in part.split("/") or "\0" in part:
            raise StorageError(
                f"a name must not lead out of its folder (got {part!r}); use a relative name without '..'"
            )
    return "/".join([location.rstrip("/") or "/", *parts])


def base_name(location: str) -> str:
    """Last part of a path or URL; for ``.``, ``..`` and ``~``, the real name of the folder."""
    name = location.rstrip("/").rsplit("/", 1)[-1]
    return name if is_remote(location) or name not in ("", ".", "..", "~") else local(location).resolve().name


def local(location: str) -> Path:
    """A local location as a `Path`."""
    return Path(local_name(location))


def local_name(location: str) -> str:
    """A local location as a string, with ``~`` expanded.

    Raises:
        StorageError: the user in ``~user`` has no home folder, as in many containers; or the locale cannot encode the
            name.
    """
    name = os.path.expanduser(location.removeprefix("file://"))  # noqa: PTH111
    if name.startswith("~"):
        user = name[1:].partition("/")[0] or os.getuid()
        raise StorageError(
            f"{location} must begin with a home folder (got no home folder for user {user}); write the full path"
        )
    try:
        os.fsencode(name)
    except UnicodeEncodeError as error:
        letter = error.object[error.start]
        raise StorageError(f"{location} must fit the locale's encoding (got {letter!r}); set LC_ALL=C.UTF-8") from None
    return name


def filesystem(location: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it."""
    import fsspec  # imported here, because it takes 0.1 s and local runs do not need it

    try:
        return fsspec.core.url_to_fs(location, **_retry_options(location))
    except ValueError as error:
        raise StorageError(
            f"no file system for {location} ({error}); use a path, or a URL that fsspec supports"
        ) from error
    except ImportError as error:
        raise StorageError(
            f"no file system for {location} ({error}); install that package (for S3, run: {install_extra('s3')})"
        ) from error


def _retry_options(location: str) -> dict[str, Any]:
    """Options that let an S3 client retry for about a minute after HTTP 503; empty if the user has set options.

    The client's default of five attempts is too short for a store that is busy for some seconds.
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
    """Convert an `OSError` or an error of a remote store to a one-line `StorageError` that names the location.

    Store clients raise exception types of many libraries (botocore, aiohttp, google), so for a remote location every
    exception is converted. With ``of_store=False``, only an `OSError` is.
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
    """Mode and owner of the file or folder that denied access, for the error message."""
    place = (Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else place).absolute()
    if verb in ("write", "delete") and error.errno == errno.EACCES:  # the permissions of the folder decide
        place = place.parent
    for path in (place, *place.parents):
        try:
            return f": {path} is {described(path)}"
        except OSError:  # the path does not exist yet, or lies in a folder that cannot be entered
            continue
    return ""


def described(path: Path) -> str:
    """Mode and owner of a local file or folder, such as ``drwxr-x--- of alice:team``."""
    status = path.stat()
    try:
        owner = pwd.getpwuid(status.st_uid).pw_name
    except KeyError:  # the user has no name, as in some containers
        owner = str(status.st_uid)
    return f"{stat.filemode(status.st_mode)} of {owner}:{group_of(path)}"


def group_of(path: Path) -> str:
    """Name of the group of a local file or folder, or the group id if it has no name."""
    try:
        return path.group()
    except KeyError:
        return str(path.stat().st_gid)


def _words(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
