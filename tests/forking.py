"""Processes that tests start: ``python -m MODULE``, alone or as ranks, forked where a fork cannot be told from a start.

Importing torch and DeepSpeed takes seconds. A server (`tests.fork_server`) imports them once in a session, and each
process is a fork of it. Some start for real: where Python or a library reads the environment when it is loaded, where
there is a GPU, which a fork cannot use, and with ``real=True``, for tests that are about starting.
"""

import json
import os
import select
import socket
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

__all__ = ["HANG_SECONDS", "TOP", "start"]

TOP = Path(__file__).resolve().parents[1]
HANG_SECONDS = 1500.0
"""Longer than anything here takes on a busy machine: only what hangs is given up."""
_READ_AT_START = (
    "PYTHON",
    "LD_",
    "LC_",
    "LANG",
    "OMP_",
    "GOMP_",
    "MKL_",
    "OPENBLAS_",
    "FSSPEC_",
    "DS_",
    "TORCH",
    "CUDA_",
)
"""Variables that are read before a process could be told them after a fork."""
_SET_IN_PASSING = {"TORCHINDUCTOR_CACHE_DIR", "DS_ACCELERATOR", "GOMP_SPINCOUNT"}
"""torch.compile, `start_process_group` and a pool set them in this process, to what every process sets by itself."""


class _Forked(subprocess.Popen[str]):
    """A process that the server forked; it is waited for through its connection, because it is no child of ours."""

    def __init__(self, ranks: int, module: str, arguments: list[str], **options: Any) -> None:
        self._request = {"ranks": ranks, "module": module, "arguments": arguments}
        super().__init__([module, *arguments], text=True, **options)

    def _execute_child(  # type: ignore[override]
        self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell,
        p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite,
        restore_signals, gid, gids, uid, umask, start_new_session, process_group,
    ) -> None:  # fmt: skip
        request = self._request | {"environment": dict(env), "folder": str(cwd), "new_session": start_new_session}
        streams = [own if own >= 0 else number for number, own in enumerate((p2cread, c2pwrite, errwrite))]
        self._connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            message = json.dumps(request).encode()
            socket.send_fds(_server(), [message], [*streams, theirs.fileno()])
        self.pid = int(self._connection.recv(32))
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)

    def _internal_poll(self, _deadstate: int | None = None, **_: Any) -> int | None:
        if self.returncode is None and select.select([self._connection], [], [], 0)[0]:
            self._read_code()
        return self.returncode

    def _wait(self, timeout: float | None) -> int:
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                assert timeout is not None
                raise subprocess.TimeoutExpired(self.args, timeout)
            self._read_code()
        return self.returncode

    def _read_code(self) -> None:
        code = self._connection.recv(32)
        self._connection.close()
        assert code, "the server of forks has ended"
        self.returncode = int(code)


def start(
    *arguments: str,
    module: str = "tarflow_scale",
    ranks: int = 0,
    environment: Mapping[str, str] | None = None,
    cwd: Path = TOP,
    real: bool = False,
    **options: Any,
) -> "subprocess.Popen[str]":
    """Start ``python -m MODULE ARGUMENT ...``; with ``ranks``, as torchrun starts them.

    Args:
        arguments: of the module.
        module: is run as ``__main__``.
        ranks: processes that rendezvous over gloo; 0 is one process without a launcher.
        environment: variables on top of this process's.
        cwd: folder of the process.
        real: never fork.
        options: of `subprocess.Popen`.
    """
    variables = os.environ | {"OMP_NUM_THREADS": "1"} | dict(environment or {})
    if not real and _is_known(variables):
        return _Forked(ranks, module, list(arguments), cwd=cwd, env=variables, **options)
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"] if ranks else []
    command = [sys.executable, "-m", *launcher, module, *arguments]
    return subprocess.Popen(command, cwd=cwd, env=variables, text=True, **options)


def _is_known(variables: Mapping[str, str]) -> bool:
    """Whether the server was started with the same values of what is read at a start."""
    if sys.platform != "linux" or torch.cuda.is_available():
        return False
    own = _server_environment()
    names = {name for name in (*variables, *own) if name.startswith(_READ_AT_START) and name not in _SET_IN_PASSING}
    return all(variables.get(name) == own.get(name) for name in names)


@cache
def _server_environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


@cache
def _server() -> socket.socket:
    """The connection to the server, which ends with this process."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        subprocess.Popen(
            [sys.executable, "-m", "tests.fork_server", str(theirs.fileno())],
            cwd=TOP,
            env=_server_environment(),
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
        )
    assert ours.recv(16) == b"ready", "the server of forks must start"
    return ours
