"""Control of processes: end with the parent, ignore signals, exit cleanly, lock a folder, run code with a deadline."""

import atexit
import ctypes
import fcntl
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO, Any, NoReturn, TypeVar

from tarflow_scale.errors import StorageError

__all__ = ["answer_within", "die_with_parent", "exclusive", "ignore_stop_signals", "leave", "stop_signals_held"]

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)

_PR_SET_PDEATHSIG = 1
_POLL_SECONDS = 0.2
_REAP_SECONDS = 2.0

T = TypeVar("T")


def die_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """Ask the kernel to send this process a signal when its parent dies; Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number)
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:  # the parent died while this process was starting
        os.kill(os.getpid(), number)


def ignore_stop_signals() -> None:
    """Ignore the stop signals that schedulers and launchers send to all processes of a job; the parent handles them."""
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def stop_signals_held() -> Generator[None]:
    """Block stop signals in this thread while it starts processes that must not receive them.

    Child processes inherit the blocked signals. A worker process needs this until it ignores the signals itself. The
    resource tracker of `multiprocessing` needs it because SIGUSR1 would kill the tracker, and the parent would then
    print a traceback when it exits.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave(code: int) -> NoReturn:
    """End this process: run exit handlers, flush output, and skip Python's own shutdown.

    Python's shutdown may abort a process after a finished run (https://github.com/pytorch/pytorch/issues/190489):
    threads of gloo hold tensors, and still run after `torch.distributed.destroy_process_group`, because DeepSpeed keeps
    references to the groups. If such a thread releases its tensor during the shutdown, the process aborts.
    """
    atexit._run_exitfuncs()  # pyright: ignore[reportPrivateUsage]  # what `sys.exit` would run
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def answer_within(seconds: float, compute: Callable[[], T]) -> T:
    """Run a function in a child process with a deadline, and return its result.

    Use this for a function that may hang, crash, or change the state of its process. The child is a fork, so this
    process must not have started threads. The child and all processes that it started are killed at the end.

    Args:
        seconds: time until the deadline.
        compute: the function; it must return a picklable value and raise no exception.

    Raises:
        TimeoutError: the function did not return in time.
        ChildProcessError: the child ended without a result; the message has its exit code and its last line of output.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryFile() as output:
        child = context.Process(target=_answer, args=(compute, sender, output.fileno()))
        child.start()
        sender.close()
        try:
            if not receiver.poll(seconds):
                raise TimeoutError(f"no answer within {seconds:g} s")
            return receiver.recv()
        except EOFError:
            child.join(_REAP_SECONDS)
            output.seek(0)
            raise ChildProcessError(_end_in_words(child.exitcode, output.read())) from None
        finally:
            _end_with_offspring(child)


def _answer(compute: Callable[[], Any], sender: Connection, output: int) -> None:
    os.setsid()  # so that all processes that it starts can be killed with it
    die_with_parent()
    for stream in (1, 2):
        os.dup2(output, stream)
    sender.send(compute())
    sender.close()


def _end_with_offspring(child: BaseProcess) -> None:
    assert child.pid is not None
    with suppress(ProcessLookupError):  # no process is left
        os.killpg(child.pid, signal.SIGKILL)
    child.kill()
    child.join(_REAP_SECONDS)  # with a limit, because a process that waits for a dead file system cannot be killed


def _end_in_words(exit_code: int | None, output: bytes) -> str:
    lines = output.decode(errors="replace").strip().splitlines()
    how = f"ended by {signal.Signals(-exit_code).name}" if exit_code and exit_code < 0 else f"exit code {exit_code}"
    return how + (f": {lines[-1].strip()}" if lines else "")


@contextmanager
def exclusive(folder: Path, wait_seconds: float = 0.0) -> Generator[None]:
    """Lock a local folder against other processes, also on other machines if its file system supports that.

    The kernel releases the lock when this process ends, even if it is killed.

    Raises:
        StorageError: the folder cannot be written, or another process holds the lock for longer than ``wait_seconds``.
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
    started, reported = time.monotonic(), False
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
                    f"{lock.parent} must have one writer at a time (in use by {holder}); wait for that process, stop "
                    f"it, or choose another folder"
                ) from None
            if not reported:
                print(f"waiting for {holder} to release {lock.parent}", file=sys.stderr, flush=True)
                reported = True
            time.sleep(_POLL_SECONDS)
            continue
        except OSError as error:  # some network file systems have no locks
            warnings.warn(
                f"cannot lock {lock.parent} ({error.strerror}); let only one process write there", stacklevel=4
            )
            return file
        if lock.exists() and os.path.samestat(os.fstat(file.fileno()), lock.stat()):
            return file
        file.close()  # the previous holder removed this file after it was opened
