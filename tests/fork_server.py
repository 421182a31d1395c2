"""The server of `tests.forking`: it has imported torch and DeepSpeed, started no thread, and forks what tests run.

A child of it behaves as ``python -m MODULE ARGUMENT ...``: own standard streams, environment, folder, exit code. With
ranks, it is a launcher that forks them and does what torchrun does, short of restarting. One request is one connection
of ``SOCK_SEQPACKET``: a JSON object with three file descriptors in, the process id out, and the exit code out when the
child has ended.
"""

import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from tarflow_scale.runtime import cores

cores.spin_briefly()  # as `tarflow_scale.__main__` does before torch is imported
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # as `start_process_group` does before DeepSpeed is imported

import torch.distributed as dist  # noqa: E402

import tarflow_scale.loading  # noqa: E402
import tarflow_scale.training.optimizers  # noqa: E402
import tarflow_scale.verbs.convert  # noqa: E402
import tarflow_scale.verbs.evaluate.driver  # noqa: E402
import tarflow_scale.verbs.evaluate.worker  # noqa: E402
import tarflow_scale.verbs.generate.driver  # noqa: E402
import tarflow_scale.verbs.generate.worker  # noqa: E402
import tarflow_scale.verbs.models.commands  # noqa: E402
import tarflow_scale.verbs.models.exchange  # noqa: E402
import tarflow_scale.verbs.prepare  # noqa: E402
import tarflow_scale.verbs.promote  # noqa: E402
import tarflow_scale.verbs.report  # noqa: E402
import tarflow_scale.verbs.score.driver  # noqa: E402
import tarflow_scale.verbs.score.worker  # noqa: E402
import tarflow_scale.verbs.train.driver  # noqa: E402, F401
from tarflow_scale.runtime.processes import die_with_parent  # noqa: E402
from tarflow_scale.training.engine import _import_deepspeed  # noqa: E402

_REQUEST_BYTES = 1 << 20
_GRACE_SECONDS = 30.0
"""As long as torchrun gives ranks to end after SIGTERM."""


def main() -> None:
    """Serve at the socket whose file descriptor is the argument, until its other end is closed."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the tests, which end their processes
    _import_deepspeed()
    # When training starts, by any optimizer, DeepSpeed imports Muon, and with it torch's compiler, in four seconds.
    importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "a process with threads must not fork"
    control = socket.socket(fileno=int(sys.argv[1]))
    control.send(b"ready")
    waiting = selectors.PollSelector()
    waiting.register(control, selectors.EVENT_READ)
    while True:
        for key, _ in waiting.select():
            if key.data is not None:  # a child has ended
                pid, client = key.data
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                waiting.unregister(key.fd)
                os.close(key.fd)
                with suppress(OSError):  # the test does not wait for it
                    client.send(str(code).encode())
                client.close()
                continue
            message, descriptors, _, _ = socket.recv_fds(control, _REQUEST_BYTES, 4)
            if not message:
                return
            client = socket.socket(fileno=descriptors.pop())
            pid = os.fork()
            if pid == 0:
                held = [key.fd for key in waiting.get_map().values()]
                held += [key.data[1].fileno() for key in waiting.get_map().values() if key.data]
                _become(json.loads(message), descriptors, [*held, client.fileno()])
            for descriptor in descriptors:
                os.close(descriptor)
            client.send(str(pid).encode())
            waiting.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, client))


def _become(request: dict[str, Any], streams: list[int], held: list[int]) -> NoReturn:
    """Be the process that was asked for."""
    if request["new_session"]:
        os.setsid()
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
    for descriptor in {*streams, *held}:
        if descriptor > 2:
            os.close(descriptor)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    time.tzset()
    tempfile.tempdir = None
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [request["module"], *request["arguments"]]
    own = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = [request["folder"], *(path for path in own if path), *(path for path in sys.path if path not in own)]
    if request["ranks"]:
        _launch(request["ranks"])
    _run(request["module"])


def _run(module: str) -> NoReturn:
    """Run a module as ``python -m`` does, and end with its exit code."""
    code: Any = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        from tarflow_scale.runtime.processes import leave

        leave(int(code or 0))


def _launch(num_ranks: int) -> None:
    """Fork the ranks and end as torchrun does; returns in each rank, where the environment says which one it is.

    Ranks wait for the port of a store that is opened after they are forked, because it has threads.
    """
    pipes = [os.pipe() for _ in range(num_ranks)]
    pids: list[int] = []
    for rank, (reader, _) in enumerate(pipes):
        pids.append(os.fork())
        if pids[-1] == 0:
            for _, writer in pipes:
                os.close(writer)
            port = os.read(reader, 16).decode()
            os.environ |= _environment_of(rank, num_ranks, port)
            return
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for reader, writer in pipes:
        os.close(reader)
        os.write(writer, str(store.port).encode())
        os.close(writer)
    signal.signal(signal.SIGTERM, lambda *_: [os.kill(pid, signal.SIGTERM) for pid in pids])
    os._exit(_wait_for(pids))


def _environment_of(rank: int, num_ranks: int, port: str) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def _wait_for(pids: list[int]) -> int:
    """0 when all ranks have ended with 0; the first that does not ends the others, and the code is torchrun's 1."""
    code, deadline = 0, float("inf")
    while pids:
        pid, status = os.waitpid(-1, os.WNOHANG if code else 0)
        if pid:
            pids.remove(pid)
        else:
            time.sleep(0.02)
        if pid and status and not code:
            code, deadline = 1, time.monotonic() + _GRACE_SECONDS
            for other in pids:
                os.kill(other, signal.SIGTERM)
        if time.monotonic() > deadline:
            for other in pids:
                os.kill(other, signal.SIGKILL)
            deadline = float("inf")
    return code


if __name__ == "__main__":
    main()
