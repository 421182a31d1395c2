"""Handling of Ctrl-C: while modules are imported, the process ends at once, because no work has started.

By default, Python raises KeyboardInterrupt. During an import, this exception prints a traceback, aborts the process if
it passes through C++ code, or is lost if it is raised in a callback.
"""

import os
import signal
from contextlib import suppress
from types import FrameType

__all__ = ["INTERRUPTED", "INTERRUPTED_CODE", "end_process", "raise_exceptions"]

INTERRUPTED = "tarflow-scale: interrupted; run the same command again to continue"
INTERRUPTED_CODE = 130


def end_process() -> None:
    """Make Ctrl-C end this process at once, unless it ignored Ctrl-C from the start (a background job of a script)."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def raise_exceptions() -> None:
    """Make Ctrl-C raise KeyboardInterrupt again, if `end_process` has changed that."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: FrameType | None) -> None:
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):  # standard error is closed
            os.write(2, f"{INTERRUPTED}\n".encode())
    os._exit(INTERRUPTED_CODE)
