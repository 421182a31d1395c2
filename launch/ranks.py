"""torchrun with the exit codes of tarflow-scale, and without errors of its own when ranks stopped as requested.

    python launch/ranks.py OPTIONS-OF-TORCHRUN -m tarflow_scale train ...

torchrun's own exit code is always 1, after a page of text. Here the exit code is 75 if the ranks saved and stopped, or
were stopped before they started, and 2 if a rank met a mistake, which it has printed. Bugs keep torchrun's page.
"""

import logging
import os
import signal
import sys
import tempfile
from types import FrameType

STOPPED, MISTAKE = 75, 2
SIGNALS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT]
"""Signals that are forwarded to ranks. Schedulers send the first two when they need the machine."""


def code_of(number: int) -> int:
    """The exit code after a signal that no rank handled."""
    return STOPPED if number in SIGNALS[:2] else 128 + number


def leave(number: int, frame: FrameType | None) -> None:
    """Exit before there are ranks; torchrun's own handlers replace this one later.

    It exits at once, because Python drops an exception that is raised in a callback, for example during an import.
    """
    os._exit(code_of(number))


def says_more(record: logging.LogRecord) -> bool:
    """Whether a line of torchrun is kept. Lines on the end of a rank repeat the page on a bug, or are no error."""
    return not str(record.msg).startswith("failed (exitcode")


def report_unraisable(error: "sys.UnraisableHookArgs") -> None:
    """Report an error in a finalizer, unless it is that of torch's rendezvous timer.

    If garbage collection ends the timer in the timer's own thread, its finalizer cannot join that thread (torch 2.11).
    """
    if str(error.exc_value) != "cannot join current thread":
        sys.__unraisablehook__(error)


def main() -> int:
    """Run torchrun with the arguments of this process; returns the exit code."""
    sys.unraisablehook = report_unraisable
    for number in SIGNALS:
        signal.signal(number, leave)
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    for module in ("multiprocessing.api", "agent.server.api"):  # their loggers
        logger = logging.getLogger(f"torch.distributed.elastic.{module}")
        logger.setLevel(logging.ERROR)  # without a line for each signal to each rank
        logger.addFilter(says_more)
    with tempfile.TemporaryFile("r+") as codes:  # nameless, so that no file is left behind
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
    """Ignore signals after the ranks have ended; they could kill this process before it returns its exit code."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    sys.exit(main())
