"""Make failures of standard output and standard error harmless, so that a verb still finishes its work.

Printing can fail: the reader has exited (``| head``), a disk is full (``>/dev/full``), the stream is closed (``2>&-``),
or its encoding lacks a character (a C locale). After `guard` none of these raises an exception: characters that cannot
be encoded are escaped, and text that cannot be written is dropped.

The exit code reports lost standard output:

* If the reader exited, or the stream was closed from the start, the exit code does not change.
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
    """A stream to a file descriptor. Writing never raises an error: it stores the first error and drops later data."""

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
            if written is None:  # the descriptor is non-blocking, which another program may have set
                select.select([], [self], [])
            else:
                rest = rest[written:]
        return size


def guard() -> None:
    """Replace `sys.stdout` and `sys.stderr` of this process, and open /dev/null for every closed standard descriptor.

    If descriptor 0, 1 or 2 stayed closed, the next file or socket that is opened would get its number, and the output
    of libraries would go there.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free number, this one
    sys.stdout = _stream(1, sys.stdout)
    sys.stderr = _stream(2, sys.stderr)


def _stream(number: int, before: TextIO | None) -> TextIO:
    """A stream for descriptor ``number`` with the settings of ``before``; default settings if ``before`` is None."""
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
    """Flush standard output and return ``code``, or 2 if ``code`` is 0 and output was lost.

    Output that was lost because the reader exited does not count.
    """
    stream = sys.stdout
    stream.flush()
    buffer = getattr(stream, "buffer", None)
    error = getattr(getattr(buffer, "raw", buffer), "error", None)
    if error is None or isinstance(error, BrokenPipeError) or code != 0:
        return code
    print(
        f"tarflow-scale: error: standard output must be writable (got: {error.strerror}); the work is done, but its "
        f"output is lost: free disk space, or redirect the output to a file",
        file=sys.stderr,
    )
    return 2
