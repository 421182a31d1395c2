"""Checks of the operating system: cores, shared memory, limits, home folder, temporary space."""

import os
import re
import resource
import shutil
import tempfile
from pathlib import Path

from tarflow_scale.pool import OBJECT_STORE_BYTES
from tarflow_scale.runtime import distributed
from tarflow_scale.runtime.cores import num_cores, num_threads
from tarflow_scale.verbs.doctor.finding import Finding, failed, ok, warning

__all__ = ["home", "limits", "nearest", "shared_memory", "temporary", "threads"]

_GIB, _MIB = 1024**3, 1024**2
_THREAD_COUNTS = re.compile(r"\s*0*[1-9]\d*\s*(,\s*0*[1-9]\d*\s*)*")
"""Values of OMP_NUM_THREADS that OpenMP accepts: a number, or a list of numbers for nested parallel regions."""
_SHARED = Path("/dev/shm")  # noqa: S108 - Linux's own place
_ROOMY_SHARED_BYTES = _GIB
_FEW_FILES, _FEWEST_FILES = 1024, 256
_SOCKET_PATH_BYTES = 107
"""Maximum length of the path of a Unix socket on Linux."""
_RAY_SOCKET = "ray/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store"
"""The longest path of a socket that Ray makes below its temporary folder."""
_FULL_SHARE = 0.95
"""Share of used disk space above which Ray stops writing to the disk."""
_LEAST_BYTES = _GIB


def threads(asked: int) -> list[Finding]:
    """Compare the number of training threads with the number of cores.

    Args:
        asked: ``training.threads``; 0 if the configuration does not set it.
    """
    cores, ranks = num_cores(), distributed.local_world_size()
    given = os.environ.get("OMP_NUM_THREADS")
    share = max(1, cores // ranks)
    advice = f"set it to {share}" if asked or ranks > 1 else f"set it to {share}, or unset it"
    if given is not None and not _THREAD_COUNTS.fullmatch(given):
        return [failed("threads", f"OMP_NUM_THREADS is not a number of threads ({given!r})", advice)]
    used = num_threads(asked, ranks)
    source = f"training.threads={asked}" if asked else f"OMP_NUM_THREADS={given}" if given else "an equal share"
    if used > cores:
        return [failed("threads", f"{source} on {cores} cores, which makes threads wait for each other", advice)]
    if used > share:
        return [warning("threads", f"{source} for each of {ranks} ranks on {cores} cores", advice)]
    each = f"each of {ranks} ranks" if ranks > 1 else "training"
    return [ok("threads", f"{cores} core{'s' * (cores > 1)}, {used} thread{'s' * (used > 1)} for {each} ({source})")]


def shared_memory() -> list[Finding]:
    """Check the size of /dev/shm, which Ray's object store and NCCL use; a container has 64 MiB by default."""
    if not _SHARED.is_dir():
        return [failed("memory", f"there is no {_SHARED}", "mount a tmpfs there")]
    usage = shutil.disk_usage(_SHARED)
    advice = "start the container with --shm-size=8g (in Kubernetes, mount an emptyDir of medium Memory there)"
    space = f"{_SHARED} has {_in_words(usage.free)} free of {_in_words(usage.total)}"
    if usage.free < OBJECT_STORE_BYTES:
        return [failed("memory", f"{space}, and Ray needs {_in_words(OBJECT_STORE_BYTES)} for its objects", advice)]
    if usage.total < _ROOMY_SHARED_BYTES:
        return [warning("memory", space, advice)]
    return [ok("memory", space)]


def limits() -> list[Finding]:
    """Check the number of files that a process may open; Ray and storage clients open many files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    advice = f"ulimit -n {min(65536, hard) if hard > 0 else 65536}"
    if soft != resource.RLIM_INFINITY and soft < _FEWEST_FILES:
        return [failed("limits", f"a process may have {soft} files open", advice)]
    if soft != resource.RLIM_INFINITY and soft < _FEW_FILES:
        return [warning("limits", f"a process may have {soft} files open", advice)]
    return [ok("limits", f"a process may have {soft if soft > 0 else 'any number of'} files open")]


def home() -> list[Finding]:
    """Check that the cache folders of DeepSpeed's operators and Triton's kernels can be written."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    extensions = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or caches / "torch_extensions")
    triton = Path(os.environ.get("TRITON_CACHE_DIR") or "~/.triton")
    advice = "set HOME to a folder that can be written, or TORCH_EXTENSIONS_DIR and TRITON_CACHE_DIR"
    for place in (extensions, triton):
        try:
            error = _unwritable(place)
        except RuntimeError:  # HOME is not set and the user is not in /etc/passwd, as in many containers
            return [failed("home", f"HOME is not set and user {os.getuid()} has no home folder", advice)]
        if error:
            return [failed("home", f"cannot write {place.expanduser()} ({error})", advice)]
    return [ok("home", f"{extensions.expanduser()} and {triton.expanduser()} can be written")]


def temporary(place: Path) -> list[Finding]:
    """Check Ray's temporary folder: length of socket paths, write access, and free space.

    Args:
        place: the folder that `tarflow_scale.pool.temporary_folder` returns.
    """
    length = len(os.fsencode(place / _RAY_SOCKET))
    if length > _SOCKET_PATH_BYTES:
        return [
            failed(
                "temporary",
                f"Ray's sockets below {place} have paths of {length} bytes, and Linux allows {_SOCKET_PATH_BYTES}",
                "set RAY_TMPDIR to a shorter path",
            )
        ]
    for folder in (place, place / "ray"):  # the second may belong to another user
        if error := _unwritable(folder):
            problem = f"cannot write {folder} ({error})"
            return [failed("temporary", problem, "set RAY_TMPDIR to a folder of your own that can be written")]
    usage = shutil.disk_usage(nearest(place))
    space = f"{place} has {_in_words(usage.free)} free"
    if usage.free < (1 - _FULL_SHARE) * usage.total or usage.free < _LEAST_BYTES:
        advice = "free space, or set RAY_TMPDIR to another disk"
        return [warning("temporary", f"{space} of {_in_words(usage.total)}", advice)]
    return [ok("temporary", f"{space}; paths of Ray's sockets fit")]


def nearest(place: Path) -> Path:
    """The folder itself, or its nearest parent that exists."""
    place = place.absolute()
    return next(folder for folder in (place, *place.parents) if folder.is_dir())


def _unwritable(place: Path) -> str:
    """Try to write to the folder, or to its nearest parent that exists; return the error, or an empty string."""
    place = place.expanduser().absolute()
    try:
        existing = next(path for path in (place, *place.parents) if path.exists())
        with tempfile.TemporaryDirectory(prefix=".tarflow-scale-", dir=existing) as folder:
            Path(folder, "try").write_bytes(b"written")
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _in_words(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.1f} GiB" if num_bytes >= _GIB else f"{num_bytes / _MIB:.0f} MiB"
