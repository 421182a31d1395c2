"""A process that tests fork is one that they would have started: streams, environment, folder, end, and ranks."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests import forking
from tests.forking import HANG_SECONDS, start

SHOWN = """
import json, os, signal, sys, threading
lines = sys.stdin.read()
print("an error", file=sys.stderr)
here = {name: os.environ.get(name) for name in ("SHOWN", "HOME", "RANK", "WORLD_SIZE")}
here |= {"arguments": sys.argv[1:], "folder": os.getcwd(), "read": lines, "name": __name__}
here |= {"leads": os.getpid() == os.getsid(0), "int": signal.getsignal(signal.SIGINT) is signal.default_int_handler}
here |= {"threads": threading.active_count(), "files": sorted(os.listdir("/proc/self/fd"))[:4], "path": sys.path[0]}
print(json.dumps(here))
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def module(tmp_path: Path) -> Path:
    """A folder in which the module ``shown`` is."""
    (tmp_path / "shown.py").write_text(SHOWN)
    return tmp_path


def shown(folder: Path, real: bool) -> tuple[int, dict[str, object], str]:
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = {"SHOWN": "yes", "HOME": str(folder)}
    process = start("3", "x y", module="shown", cwd=folder, environment=environment, real=real,
                    start_new_session=True, **streams)  # fmt: skip
    output, errors = process.communicate("two\nlines", timeout=HANG_SECONDS)
    return process.returncode, json.loads(output), errors


def test_a_fork_cannot_be_told_from_a_start(module: Path) -> None:
    forked, started = shown(module, real=False), shown(module, real=True)
    assert forked == started
    assert (forked[0], forked[2]) == (3, "an error\n")
    assert forked[1]["leads"] is forked[1]["int"] is True


def test_one_that_is_killed_is_reported(tmp_path: Path) -> None:
    (tmp_path / "hangs.py").write_text("print('here', flush=True)\nimport time\ntime.sleep(3600)\n")
    process = start(module="hangs", cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait(HANG_SECONDS) == -signal.SIGKILL
    assert process.poll() == -signal.SIGKILL


def test_what_is_read_at_a_start_makes_it_a_start(module: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = forking._server_environment()
    for name in set(os.environ) - set(known):
        monkeypatch.delenv(name)
    for name, value in known.items():
        monkeypatch.setenv(name, value)
    assert "tests.fork_server" in command_line({}, module)
    assert "tests.fork_server" not in command_line({"PYTHONHASHSEED": "1"}, module)


def command_line(environment: dict[str, str], folder: Path) -> str:
    (folder / "line.py").write_text("print(open('/proc/self/cmdline').read())")
    process = start(module="line", cwd=folder, environment=environment, stdout=subprocess.PIPE)
    return process.communicate(timeout=HANG_SECONDS)[0]


RANK = """
import os, sys, time, torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.tensor([dist.get_rank() + 1.0])
dist.all_reduce(total)
sys.stdout.write(f"{os.environ['LOCAL_RANK']} {int(total)}\\n")  # one write, so that lines of ranks do not mix
sys.stdout.flush()
if sys.argv[1:] == [os.environ["RANK"]]:
    os._exit(5)
if sys.argv[1:]:
    time.sleep(3600)
"""


@pytest.mark.distributed
@pytest.mark.parametrize(("fails", "code"), [([], 0), (["1"], 1)])
def test_ranks_meet_and_one_that_fails_ends_the_others(fails: list[str], code: int, tmp_path: Path) -> None:
    (tmp_path / "ranked.py").write_text(RANK)
    process = start(*fails, module="ranked", ranks=2, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    output, errors = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == code, errors
    assert sorted(output.splitlines()) == ["0 3", "1 3"]
