"""``tarflow-scale`` and ``python -m tarflow_scale``: the command line as a process."""

import io
import sys
from typing import NoReturn

from tarflow_scale import cli
from tarflow_scale.processes import leave


def main() -> NoReturn:
    """Run a verb and end the process with its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # in a file too, where Python would show the first line at the end
    leave(cli.main())


if __name__ == "__main__":
    main()
