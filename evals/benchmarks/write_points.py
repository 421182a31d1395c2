"""Write points: disturb a function before or after any of its system calls that change a file system."""

import errno
import gc
import os
import signal
import traceback
from collections.abc import Callable
from typing import Any

from tarflow_scale.errors import StorageError

__all__ = ["disturbed_at", "fill_disk", "kill_self"]


def disturbed_at(change: Callable[[], object], point: int, disturb: Callable[[], object]) -> tuple[int, int]:
    """Run ``change`` in a process that is disturbed at a write point. Returns (exit code, number of points passed)."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        gc.freeze()  # objects of threads that the fork has not, such as Ray's, must not be collected here
        os.close(reader)
        code, passed = 1, 0

        def counted(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **more: Any) -> Any:
                nonlocal passed
                for when in ("before", "after"):
                    if passed == point:
                        disturb()
                    passed += 1
                    if when == "before":
                        result = real(*arguments, **more)
                return result  # pyright: ignore[reportPossiblyUnboundVariable]

            return call

        try:
            for name in ("fsync", "link", "replace", "rename", "unlink"):
                setattr(os, name, counted(getattr(os, name)))
            change()
            code = 0
        except StorageError:
            code = 2
        except BaseException:
            traceback.print_exc()
        finally:
            os.write(writer, str(passed).encode())
            os._exit(code)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reader) as found:
        return os.waitstatus_to_exitcode(status), int(found.read() or 0)


def kill_self() -> None:
    """As ``kill -9`` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def fill_disk() -> None:
    """As a full disk answers."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
