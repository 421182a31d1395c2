"""Pieces of work done as another user, whose writes have no mode but for that user. Only root can do that."""

import contextlib
import io
import os
import warnings
from collections.abc import Callable

import pytest

from tarflow_scale import cli
from tarflow_scale.runtime.processes import answer_within

__all__ = ["ALICE", "BOB", "CAROL", "TEAM", "needs_root", "run_as"]

ALICE, BOB, CAROL, TEAM = 54001, 54002, 54003, 54100
"""Users and a group, of which Carol is no member."""
_HANG_SECONDS = 600.0

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")


def run_as(user: int, *arguments: str, work: Callable[[], object] | None = None) -> tuple[int, str]:
    """Exit code and output of ``tarflow-scale ARGUMENTS``, or of a function (0, unless it returns a number)."""

    def run() -> tuple[int, str]:
        said = io.StringIO()
        with (
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(said),
            warnings.catch_warnings(record=True) as warned,
        ):
            try:
                os.umask(0o077)
                os.setgroups([] if user == CAROL else [TEAM])
                os.setgid(user)
                os.setuid(user)
                os.environ["LOGNAME"] = f"user{user}"
                code = cli.main(arguments) if work is None else work()
            except BaseException as error:
                return -1, f"{said.getvalue()}{error!r}"
        for one in warned:  # pytest keeps them from standard error
            said.write(warnings.formatwarning(one.message, one.category, one.filename, one.lineno))
        return code if isinstance(code, int) else 0, said.getvalue()

    return answer_within(_HANG_SECONDS, run)
