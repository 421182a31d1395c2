"""Applying a function to many inputs: results are in order, and the death of a worker is reported."""

import os
import signal
import time

import pytest

from tarflow_scale.errors import DataError, UserError
from tarflow_scale.shards.workers import in_workers


def slow_first(number: int) -> int:
    time.sleep(0.3 if number == 0 else 0)
    if number in (0, 3):
        raise DataError(f"got {number}")
    return os.getpid()


def killed(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL if number == 2 else 0)
    return number


def squared(number: int) -> int:
    return number**2


@pytest.mark.parametrize("num_workers", [1, 3])
def test_results_and_errors_come_in_order(num_workers: int) -> None:
    assert list(in_workers(squared, range(5), num_workers)) == [0, 1, 4, 9, 16]
    with pytest.raises(DataError, match="got 0"):
        list(in_workers(slow_first, range(5), num_workers))
    pids = set(in_workers(slow_first, [1, 2], num_workers))
    assert (os.getpid() in pids) == (num_workers == 1)


def test_a_worker_that_is_killed_is_an_error_of_one_line() -> None:
    with pytest.raises(UserError, match=r"a worker process died .*lower shards.num_workers"):
        list(in_workers(killed, range(4), 2))
