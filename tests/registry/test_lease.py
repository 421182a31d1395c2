"""A lease: one holder at a time, given back, and taken over from one who went away."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tarflow_scale.registry import Lease
from tests.forking import HANG_SECONDS


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    path = str(tmp_path / "lease")
    with Lease(path) as first:
        assert first is not None
        with Lease(path) as second:
            assert second is None
        assert list((tmp_path / "lease").iterdir())  # who did not get it gave nothing back
    with Lease(path) as third:
        assert third is not None


def test_a_holder_that_lives_keeps_it_beyond_its_time(tmp_path: Path) -> None:
    path = str(tmp_path / "lease")
    with Lease(path, seconds=1.0):
        for _ in range(4):
            time.sleep(0.5)
            with Lease(path) as other:
                assert other is None


def test_a_holder_that_was_killed_is_succeeded(tmp_path: Path) -> None:
    path = str(tmp_path / "lease")
    code = (
        "import sys, time; from tarflow_scale.registry import Lease\n"
        "with Lease(sys.argv[1], seconds=2.0) as lease: print(lease is not None, flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "True\n"
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with Lease(path, seconds=2.0) as early:
        assert early is None
    deadline = time.monotonic() + HANG_SECONDS
    while time.monotonic() < deadline:
        with Lease(path, seconds=2.0) as late:
            if late is not None:
                break
        time.sleep(0.1)
    else:
        raise AssertionError("nobody succeeded the holder")
    assert late is not None
