"""``tarflow-scale`` and ``python -m tarflow_scale``: the command line as a process."""

import io
import os
import signal
import sys
from typing import NoReturn

from tarflow_scale import cli
from tarflow_scale.processes import leave


def main() -> NoReturn:
    """Run a verb and end the process with its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # in a file too, where Python would show the first line at the end
    try:
        code = cli.main()
    except BrokenPipeError:  # the reader has gone, as head does; the end of a program that writes to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    leave(code)


if __name__ == "__main__":
    main()
