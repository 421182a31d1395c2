"""What the operating system gives: cores, shared memory, limits, a home that can be written, temporary space."""

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
"""OpenMP takes a number for each level of nested regions."""
_SHARED = Path("/dev/shm")  # noqa: S108 - Linux's own place
_ROOMY_SHARED_BYTES = _GIB
_FEW_FILES, _FEWEST_FILES = 1024, 256
_SOCKET_PATH_BYTES = 107
"""The longest path of a Unix socket that Linux takes."""
_RAY_SOCKET = "ray/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store"
"""What Ray puts below its temporary folder, at its longest."""
_FULL_SHARE = 0.95
"""Ray stops writing to a disk that is fuller."""
_LEAST_BYTES = _GIB


def threads(asked: int) -> list[Finding]:
    """Threads with which training computes, against cores.

    Args:
        asked: ``training.threads``; 0 where the configuration leaves it open.
    """
    cores, ranks = num_cores(), distributed.local_world_size()
    given = os.environ.get("OMP_NUM_THREADS")
    share = max(1, cores // ranks)
    advice = f"set it to {share}" if asked or ranks > 1 else f"set it to {share}, or unset it"
    if given is not None and not _THREAD_COUNTS.fullmatch(given):
        return [failed("threads", f"OMP_NUM_THREADS is no number of threads ({given!r})", advice)]
    used = num_threads(asked, ranks)
    source = f"training.threads={asked}" if asked else f"OMP_NUM_THREADS={given}" if given else "an equal share"
    if used > cores:
        return [failed("threads", f"{source} on {cores} cores, which wait for each other", advice)]
    if used > share:
        return [warning("threads", f"{source} for each of {ranks} ranks on {cores} cores", advice)]
    each = f"each of {ranks} ranks" if ranks > 1 else "training"
    return [ok("threads", f"{cores} core{'s' * (cores > 1)}, {used} thread{'s' * (used > 1)} for {each} ({source})")]


def shared_memory() -> list[Finding]:
    """Size of /dev/shm: Ray's object store and NCCL's rings are there; a container has 64 MiB unless told otherwise."""
    if not _SHARED.is_dir():
        return [failed("memory", f"there is no {_SHARED}", "mount a tmpfs there")]
    facts = shutil.disk_usage(_SHARED)
    advice = "start the container with --shm-size=8g (Kubernetes: an emptyDir of medium Memory mounted there)"
    found = f"{_SHARED} has {_in_words(facts.free)} free of {_in_words(facts.total)}"
    if facts.free < OBJECT_STORE_BYTES:
        return [failed("memory", f"{found}, of which Ray's objects need {_in_words(OBJECT_STORE_BYTES)}", advice)]
    if facts.total < _ROOMY_SHARED_BYTES:
        return [warning("memory", found, advice)]
    return [ok("memory", found)]


def limits() -> list[Finding]:
    """Files that a process may have open, of which Ray and readers of stores take many; and locked memory."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    advice = f"ulimit -n {min(65536, hard) if hard > 0 else 65536}"
    if soft != resource.RLIM_INFINITY and soft < _FEWEST_FILES:
        return [failed("limits", f"a process may have {soft} files open", advice)]
    if soft != resource.RLIM_INFINITY and soft < _FEW_FILES:
        return [warning("limits", f"a process may have {soft} files open", advice)]
    return [ok("limits", f"a process may have {soft if soft > 0 else 'any number of'} files open")]


def home() -> list[Finding]:
    """Whether caches can be written: operators that DeepSpeed builds, kernels that Triton does."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    extensions = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or caches / "torch_extensions")
    triton = Path(os.environ.get("TRITON_CACHE_DIR") or "~/.triton")
    advice = "set HOME to a folder that can be written, or TORCH_EXTENSIONS_DIR and TRITON_CACHE_DIR"
    for place in (extensions, triton):
        try:
            error = _unwritable(place)
        except RuntimeError:  # no HOME, and no entry for this user in the list of users, as in many containers
            return [failed("home", f"HOME is not set and user {os.getuid()} has no home folder", advice)]
        if error:
            return [failed("home", f"cannot write {place.expanduser()} ({error})", advice)]
    return [ok("home", f"{extensions.expanduser()} and {triton.expanduser()} can be written")]


def temporary(place: Path) -> list[Finding]:
    """Where Ray keeps its sockets and spills objects: paths that are too long, or a disk that is full.

    Args:
        place: `tarflow_scale.pool.temporary_folder`.
    """
    length = len(os.fsencode(place / _RAY_SOCKET))
    if length > _SOCKET_PATH_BYTES:
        return [
            failed(
                "temporary",
                f"Ray's sockets below {place} have paths of {length} bytes, and Linux takes {_SOCKET_PATH_BYTES}",
                "set RAY_TMPDIR to a shorter path",
            )
        ]
    for folder in (place, place / "ray"):  # the second may be of another user
        if error := _unwritable(folder):
            found = f"cannot write {folder} ({error})"
            return [failed("temporary", found, "set RAY_TMPDIR to a folder of your own that can be written")]
    facts = shutil.disk_usage(nearest(place))
    found = f"{place} has {_in_words(facts.free)} free"
    if facts.free < (1 - _FULL_SHARE) * facts.total or facts.free < _LEAST_BYTES:
        return [warning("temporary", f"{found} of {_in_words(facts.total)}", "make room, or set RAY_TMPDIR elsewhere")]
    return [ok("temporary", f"{found}; paths of Ray's sockets fit")]


def nearest(place: Path) -> Path:
    """The folder itself, or the nearest above it that is there."""
    place = place.absolute()
    return next(folder for folder in (place, *place.parents) if folder.is_dir())


def _unwritable(place: Path) -> str:
    """Why nothing can be written there, or below where it would be made; empty if something can."""
    place = place.expanduser().absolute()
    try:
        there = next(one for one in (place, *place.parents) if one.exists())
        with tempfile.TemporaryDirectory(prefix=".tarflow-scale-", dir=there) as folder:
            Path(folder, "try").write_bytes(b"written")
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _in_words(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.1f} GiB" if num_bytes >= _GIB else f"{num_bytes / _MIB:.0f} MiB"
