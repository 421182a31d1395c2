"""Ranks that stop after they came: told from those that wait for them."""

import json
import socket
import subprocess
from pathlib import Path

import pytest

from tarflow_scale.errors import UserError
from tarflow_scale.verbs.doctor.collectives import meet
from tests.forking import HANG_SECONDS, start

FROZEN = """
import os, torch, torch.distributed as dist
from tarflow_scale.verbs.doctor.collectives import call_roll, meet
store = meet(1, "127.0.0.1", {port}, False, 60)
dist.PrefixStore("roll-call-0", store).set("here/1", "there")
input()  # it came, and does nothing more
"""


CALLER = """
import json, torch, torch.distributed as dist
from datetime import timedelta
from tarflow_scale.verbs.doctor.collectives import call_roll
store = dist.TCPStore("127.0.0.1", {port}, None, True, wait_for_workers=False)
dist.PrefixStore("roll-call-0", store).wait(["here/1"], timedelta(seconds=1500))
seen = call_roll(store, 0, 2, torch.device("cpu"), "gloo", "here", 2.0)
print(json.dumps([seen.hosts, seen.missing, seen.silent, seen.bytes_per_second, dist.is_initialized()]))
"""


def test_a_rank_that_falls_silent_is_named_and_one_that_waits_is_not(tmp_path: Path) -> None:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    for name, code in (("frozen", FROZEN), ("caller", CALLER)):
        (tmp_path / f"{name}.py").write_text(code.format(port=port))
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    frozen, caller = (start(module=name, cwd=tmp_path, **streams) for name in ("frozen", "caller"))
    output, _ = caller.communicate(timeout=HANG_SECONDS)
    frozen.communicate("\n", timeout=HANG_SECONDS)
    assert json.loads(output) == [{"0": "here", "1": "there"}, [], [1], None, False]


def test_where_no_first_rank_listens_is_one_line() -> None:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    message = rf"^rank 0 must answer at 127.0.0.1:{port} \(rank 3 got no answer within 1 s\); start rank 0, and"
    with pytest.raises(UserError, match=message):
        meet(3, "127.0.0.1", port, False, 1.0)
