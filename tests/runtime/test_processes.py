"""Locks that end with their holder, and processes that end with their parent."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tarflow_scale.errors import StorageError
from tarflow_scale.runtime.processes import exclusive
from tests.conftest import TOP
from tests.forking import HANG_SECONDS

HOLD = (
    "import sys, time; from pathlib import Path; from tarflow_scale.runtime.processes import exclusive\n"
    "with exclusive(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
)


def holder(folder: Path) -> "subprocess.Popen[str]":
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], cwd=TOP, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_folder_has_one_writer_and_a_kill_frees_it(tmp_path: Path) -> None:
    process = holder(tmp_path)
    with pytest.raises(StorageError, match=rf"must have one writer at a time \(in use by process {process.pid} on "):
        exclusive(tmp_path).__enter__()
    process.kill()
    process.wait()
    with exclusive(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_waiting_for_a_writer_that_stops(tmp_path: Path) -> None:
    process = holder(tmp_path)
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD.replace("Path(sys.argv[1])", "Path(sys.argv[1]), 60"), str(tmp_path)],
        cwd=TOP,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert other.stdout is not None
    assert other.stderr is not None
    assert other.stderr.readline().startswith(f"waiting for process {process.pid} on ")
    process.kill()
    process.wait()
    assert other.stdout.readline() == "held\n"
    other.kill()
    other.wait()


def take_turns(folder: Path, rounds: int) -> None:
    for _ in range(rounds):
        with exclusive(folder, wait_seconds=60):
            count = int((folder / "count").read_text())
            (folder / "count").write_text(str(count + 1))


def test_nobody_is_let_in_while_a_lock_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "count").write_text("0")
    workers = [multiprocessing.get_context("fork").Process(target=take_turns, args=(tmp_path, 30)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    assert (tmp_path / "count").read_text() == "90"


def test_a_process_ends_with_its_parent(tmp_path: Path) -> None:
    child = (
        "import os, time; from tarflow_scale.runtime.processes import die_with_parent\n"
        "die_with_parent(); print(os.getpid(), flush=True); time.sleep(600)"
    )
    parent = f"import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=TOP, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    os.kill(pid, 0)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + HANG_SECONDS
    while Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.05)


LEAVE = """
import atexit, os, sys, threading, time
from tarflow_scale.runtime.processes import leave  # noqa: E402

class Aborts:  # as a thread of gloo does that needs Python while it is taken down
    def __del__(self):
        os.abort()

kept = Aborts()
atexit.register(print, "handler", end="")
threading.Thread(target=time.sleep, args=(600,)).start()
print("work", end=" ")
leave(int(sys.argv[1]))
"""


@pytest.mark.parametrize("code", [0, 75])
def test_leaving_is_not_undone_by_what_is_left(code: int) -> None:
    command = [sys.executable, "-c", LEAVE, str(code)]
    result = subprocess.run(command, cwd=TOP, capture_output=True, text=True, timeout=HANG_SECONDS, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (code, "work handler", "")


WITHIN = """
import os, subprocess, sys, time
from tarflow_scale.runtime.processes import answer_within

def hang():
    subprocess.Popen(["sleep", "3600"], env={"MARK": sys.argv[1]})
    time.sleep(3600)

def leave_one():
    subprocess.Popen(["sleep", "3600"], env={"MARK": sys.argv[1]})
    return "answer"

def crash():
    print("last words", flush=True)
    os.abort()

for compute in (hang, leave_one, crash, lambda: sys.exit(3)):
    try:
        print(answer_within(1.0 if compute is hang else 60.0, compute))
    except (TimeoutError, ChildProcessError) as error:
        print(type(error).__name__, error)
"""


def test_an_answer_that_does_not_come_is_given_up_with_all_that_was_started() -> None:
    mark = f"mark-{os.getpid()}-{time.time_ns()}"
    result = subprocess.run(
        [sys.executable, "-c", WITHIN, mark], cwd=TOP, capture_output=True, text=True, check=False, timeout=HANG_SECONDS
    )
    assert result.stdout.splitlines() == [
        "TimeoutError no answer within 1 s",
        "answer",
        "ChildProcessError ended by SIGABRT: last words",
        "ChildProcessError exit code 3",
    ], result.stderr
    environments = []
    for process in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            environments.append(process.read_bytes())
    assert not any(mark.encode() in environment for environment in environments)
