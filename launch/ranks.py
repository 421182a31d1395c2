"""torchrun with the exit codes of tarflow-scale, and with no error of its own where ranks ended as they were told.

    python launch/ranks.py OPTIONS-OF-TORCHRUN -m tarflow_scale train ...

torchrun ends with 1 whatever happened, after a page about it. Here it ends with 75 where the ranks saved and stopped,
or were told to before they began, and with 2 where one met a mistake, which it has said itself. Bugs keep that page.
"""

import logging
import os
import signal
import sys
import tempfile
from types import FrameType

STOPPED, MISTAKE = 75, 2
SIGNALS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT]
"""Passed on to ranks. The first two are how schedulers ask for the machine."""


def code_of(number: int) -> int:
    """The exit code after a signal that no rank answered."""
    return STOPPED if number in SIGNALS[:2] else 128 + number


def leave(number: int, frame: FrameType | None) -> None:
    """End before there are ranks; torchrun's own handlers come after this one.

    At once: an exception that is raised here may come up in a callback, of an import say, where Python drops it.
    """
    os._exit(code_of(number))


def says_more(record: logging.LogRecord) -> bool:
    """Whether a line of torchrun is kept. That a rank ended is in the page about a bug too, and else no error."""
    return not str(record.msg).startswith("failed (exitcode")


def main() -> int:
    """Run torchrun with the arguments of this process; returns the exit code."""
    for number in SIGNALS:
        signal.signal(number, leave)
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    for module in ("multiprocessing.api", "agent.server.api"):  # by whose loggers they write
        logger = logging.getLogger(f"torch.distributed.elastic.{module}")
        logger.setLevel(logging.ERROR)  # not of each signal to each rank
        logger.addFilter(says_more)
    with tempfile.TemporaryFile("r+") as codes:  # without a name, so that nothing is left of it however this ends
        os.environ["TARFLOW_SCALE_EXIT_CODES"] = f"/proc/{os.getpid()}/fd/{codes.fileno()}"
        try:
            torchrun(["--signals-to-handle", ",".join(number.name for number in SIGNALS), *sys.argv[1:]])
        except (SignalException, ChildFailedError) as error:
            over()
            known = codes.read().split()
            for code in (STOPPED, MISTAKE):
                if str(code) in known:
                    return code
            if isinstance(error, SignalException):
                return code_of(error.sigval)
            raise
    over()
    return 0


def over() -> None:
    """The ranks have ended, so a signal that comes late changes nothing; Python would let it kill its last second."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    sys.exit(main())
