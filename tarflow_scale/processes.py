"""What a process asks of the operating system: its parent, its signals, its end, and who else writes to a folder."""

import atexit
import ctypes
import fcntl
import multiprocessing
import os
import signal
import socket
import sys
import time
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NoReturn

from tarflow_scale.errors import StorageError

__all__ = ["die_with_parent", "exclusive", "ignore_stop_signals", "leave"]

_PR_SET_PDEATHSIG = 1
_POLL_SECONDS = 0.2


def die_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel send this process a signal when its parent dies, however that dies; Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number)
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:  # it died while this process was starting
        os.kill(os.getpid(), number)


def ignore_stop_signals() -> None:
    """Leave it to the parent to act on what schedulers and launchers send to all processes of a job."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def leave(code: int) -> NoReturn:
    """End this process when its work is done: exit handlers run, output is flushed, Python is not taken down.

    Threads of gloo hold tensors, and outlive `torch.distributed.destroy_process_group` because DeepSpeed keeps
    references to the groups. One that drops its tensor while Python is being taken down aborts the process, which
    turns a finished run into a failed one (https://github.com/pytorch/pytorch/issues/190489).
    """
    atexit._run_exitfuncs()  # pyright: ignore[reportPrivateUsage]  # what `sys.exit` would run
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def exclusive(folder: Path, wait_seconds: float = 0.0) -> Generator[None]:
    """Hold a local folder against other processes, of this machine and where its file system has locks of all.

    The kernel lets go of it when this process ends, however it ends.

    Raises:
        StorageError: it cannot be written, or another process holds it and does not let go for ``wait_seconds``.
    """
    lock = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _locked(lock, wait_seconds)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        file.flush()
    except OSError as error:
        raise StorageError(
            f"cannot write {folder} ({error.strerror}); check the path, permissions and space"
        ) from error
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        file.close()


def _locked(lock: Path, wait_seconds: float) -> IO[bytes]:
    started, told = time.monotonic(), False
    while True:
        file = lock.open("a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().decode(errors="replace") or "another process"
            file.close()
            if time.monotonic() - started > wait_seconds:
                raise StorageError(
                    f"{lock.parent} takes one writer at a time (in use by {holder}); wait for it, stop it, or choose "
                    f"another folder"
                ) from None
            if not told:
                print(f"waiting for {holder} to let go of {lock.parent}", file=sys.stderr, flush=True)
                told = True
            time.sleep(_POLL_SECONDS)
            continue
        except OSError as error:  # some network file systems have none
            warnings.warn(f"no lock on {lock.parent} ({error.strerror}); let it have one writer", stacklevel=4)
            return file
        if lock.exists() and os.path.samestat(os.fstat(file.fileno()), lock.stat()):
            return file
        file.close()  # its holder has just removed it
