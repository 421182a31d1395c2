"""Standard output and error that cannot stop the work.

What is printed may have nowhere to go: the reader has left (``| head``), a disk is full (``>/dev/full``), the stream is
closed (``2>&-``), or its encoding lacks a character (a C locale). After `guard` none of these raises. What cannot be
encoded is escaped, and what cannot be written is dropped, so that a data set is packed and a run is saved all the same.

The exit code says what became of standard output once the work is done:

* The reader left, or the stream was closed from the start: nobody wants the output. The code is that of the work.
* It could not be written for another reason: 2 in place of 0, and one line on standard error. Other codes stay.

What is lost of standard error changes no code.
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
    """A file descriptor that takes everything: after an error it drops what is written, and keeps the error."""

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
    """Replace `sys.stdout` and `sys.stderr` of this process, and open what is closed of the standard descriptors.

    A file or socket that is opened later would otherwise get the number of a closed one, and with it all that libraries
    print.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest number that is free, this one
    sys.stdout = _stream(1, sys.stdout)
    sys.stderr = _stream(2, sys.stderr)


def _stream(number: int, before: TextIO | None) -> TextIO:
    """A stream of the same kind as the one before; Python has None where the descriptor was closed."""
    if before is not None:
        with suppress(OSError):
            before.flush()
    raw = _Output(number, "w", closefd=False)
    at_once = getattr(before, "write_through", False)
    return io.TextIOWrapper(
        raw if at_once else io.BufferedWriter(raw),  # pyright: ignore[reportArgumentType]  # as Python itself does
        encoding=getattr(before, "encoding", None) or "utf-8",
        errors="backslashreplace",
        line_buffering=True,  # in a file too, where Python would show the first line at the end
        write_through=at_once,
    )


def exit_code(code: int) -> int:
    """Of a process whose work ended with ``code``; flushes standard output, and says it where output was lost."""
    stream = sys.stdout
    stream.flush()
    buffer = getattr(stream, "buffer", None)
    error = getattr(getattr(buffer, "raw", buffer), "error", None)
    if error is None or isinstance(error, BrokenPipeError) or code != 0:
        return code
    print(
        f"tarflow-scale: error: standard output must take what is printed (got: {error.strerror}); the work is done, "
        f"make room or redirect it elsewhere to see what was found",
        file=sys.stderr,
    )
    return 2
