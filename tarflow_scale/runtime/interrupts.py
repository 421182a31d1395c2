"""Ctrl-C while modules are imported, when nothing is begun and nothing has to be put in order: the process ends.

Python's own way is an exception. In an import it shows a traceback, aborts the process where C++ code calls Python, or
is dropped where it comes up in a callback, and the work goes on as if nobody had asked it to stop.
"""

import os
import signal
from contextlib import suppress
from types import FrameType

__all__ = ["INTERRUPTED", "INTERRUPTED_CODE", "end_process", "raise_exceptions"]

INTERRUPTED = "tarflow-scale: interrupted; run the same command again to go on"
INTERRUPTED_CODE = 130


def end_process() -> None:
    """From here on Ctrl-C ends this process at once, unless the caller has had it ignored, as nohup does."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def raise_exceptions() -> None:
    """From here on Ctrl-C raises KeyboardInterrupt again, where `end_process` has changed that."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: FrameType | None) -> None:
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):  # nobody reads it
            os.write(2, f"{INTERRUPTED}\n".encode())
    os._exit(INTERRUPTED_CODE)
