"""Standard output and error that cannot stop the work.

Printing can fail: the reader has left (``| head``), a disk is full (``>/dev/full``), the stream is closed (``2>&-``),
or its encoding lacks a character (a C locale). After `guard` none of these raises an exception. Characters that
cannot be encoded are escaped, and text that cannot be written is dropped, so that a verb still finishes its work.

The exit code reports lost standard output:

* If the reader left, or the stream was closed from the start, the exit code is that of the work.
* If a write failed for another reason, exit code 0 becomes 2, with one line on standard error. Other codes stay.

Lost standard error does not change the exit code.
"""

import io
import os
import select
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

__all__ = ["exit_code", "guard"]


class _Output(io.FileIO):
    """A file descriptor whose writes never fail: after an error it keeps the error and drops all data."""

    error: OSError | None = None

    def write(self, data: "ReadableBuffer", /) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        while rest and self.error is None:
            try:
                written = super().write(rest)
            except OSError as error:
                self.error = error
                break
            if written is None:  # another program has made a pipe or terminal non-blocking
                select.select([], [self], [])
            else:
                rest = rest[written:]
        return size


def guard() -> None:
    """Replace `sys.stdout` and `sys.stderr` of this process, and open /dev/null for every closed standard descriptor.

    If descriptor 0, 1 or 2 stayed closed, a file or socket that is opened later would get its number, and would receive
    the output that libraries print.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free number, this one
    sys.stdout = _stream(1, sys.stdout)
    sys.stderr = _stream(2, sys.stderr)


def _stream(number: int, before: TextIO | None) -> TextIO:
    """A stream like the one before, which is None if the descriptor was closed."""
    if before is not None:
        with suppress(OSError):
            before.flush()
    raw = _Output(number, "w", closefd=False)
    at_once = getattr(before, "write_through", False)
    return io.TextIOWrapper(
        raw if at_once else io.BufferedWriter(raw),  # pyright: ignore[reportArgumentType]  # as Python itself does
        encoding=getattr(before, "encoding", None) or "utf-8",
        errors="backslashreplace",
        line_buffering=True,  # also in a file, to which Python would write the first line only at the end
        write_through=at_once,
    )


def exit_code(code: int) -> int:
    """Exit code of a process whose work ended with ``code``; flushes standard output and reports lost output."""
    stream = sys.stdout
    stream.flush()
    buffer = getattr(stream, "buffer", None)
    error = getattr(getattr(buffer, "raw", buffer), "error", None)
    if error is None or isinstance(error, BrokenPipeError) or code != 0:
        return code
    print(
        f"tarflow-scale: error: standard output must be writable (got: {error.strerror}); the work is done, but its "
        f"output is lost: free space or redirect it",
        file=sys.stderr,
    )
    return 2
