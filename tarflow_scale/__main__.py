"""``tarflow-scale`` and ``python -m tarflow_scale``: the command line as a process."""

from typing import NoReturn

from tarflow_scale import cli
from tarflow_scale.processes import leave


def main() -> NoReturn:
    """Run a verb and end the process with its exit code."""
    leave(cli.main())


if __name__ == "__main__":
    main()
