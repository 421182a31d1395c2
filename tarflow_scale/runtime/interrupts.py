"""Ctrl-C during imports ends the process at once, because there is no work yet to clean up.

Python raises an exception instead. During an import the exception shows a traceback, aborts the process if C++ code
calls Python, or is dropped in a callback, so that the work continues.
"""

import os
import signal
from contextlib import suppress
from types import FrameType

__all__ = ["INTERRUPTED", "INTERRUPTED_CODE", "end_process", "raise_exceptions"]

INTERRUPTED = "tarflow-scale: interrupted; run the same command again to go on"
INTERRUPTED_CODE = 130


def end_process() -> None:
    """From now on Ctrl-C ends this process at once, unless the parent made it ignore SIGINT, as nohup does."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def raise_exceptions() -> None:
    """From now on Ctrl-C raises KeyboardInterrupt again, if `end_process` has changed that."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: FrameType | None) -> None:
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):  # standard error is closed
            os.write(2, f"{INTERRUPTED}\n".encode())
    os._exit(INTERRUPTED_CODE)
