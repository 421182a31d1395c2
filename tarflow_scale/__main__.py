"""The entry point of ``tarflow-scale`` and ``python -m tarflow_scale``.

See `tarflow_scale.runtime.streams` for the behaviour and the exit code when standard output is closed or full.
"""

from typing import NoReturn

from tarflow_scale.runtime import interrupts

interrupts.end_process()  # before the slow imports

from tarflow_scale import cli  # noqa: E402
from tarflow_scale.runtime import cores, streams  # noqa: E402
from tarflow_scale.runtime.processes import leave  # noqa: E402


def main() -> NoReturn:
    """Run a verb and end the process with its exit code."""
    streams.guard()
    cores.spin_briefly()
    leave(cli.main())


if __name__ == "__main__":
    main()
