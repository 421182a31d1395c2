"""Ranks that stop after they came: told from those that wait for them."""

import os
import socket
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from tarflow_scale.errors import UserError
from tarflow_scale.roll_call import call_roll, meet
from tests.conftest import TOP

FROZEN = """
import os, torch, torch.distributed as dist
from tarflow_scale.roll_call import call_roll, meet
store = meet(1, "127.0.0.1", {port}, False, 60)
dist.PrefixStore("roll-call-0", store).set("here/1", "there")
input()  # it came, and does nothing more
"""


def test_a_rank_that_falls_silent_is_named_and_one_that_waits_is_not() -> None:
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    code = FROZEN.format(port=store.port)
    environment = os.environ | {"PYTHONPATH": str(TOP)}
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, env=environment) as frozen:
        dist.PrefixStore("roll-call-0", store).wait(["here/1"], timedelta(seconds=60))
        seen = call_roll(store, 0, 2, torch.device("cpu"), "gloo", "here", 2.0)
        frozen.communicate(b"\n")
    assert seen.hosts == {0: "here", 1: "there"}
    assert (seen.missing, seen.silent) == ((), (1,))
    assert seen.bytes_per_second is None
    assert not dist.is_initialized()


def test_where_no_first_rank_listens_is_one_line() -> None:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    message = rf"^rank 0 must answer at 127.0.0.1:{port} \(got no answer within 1 s, for rank 3\); start it, and let"
    with pytest.raises(UserError, match=message):
        meet(3, "127.0.0.1", port, False, 1.0)
