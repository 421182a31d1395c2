"""Roll call: find out which ranks answer, which do not, and how fast their all-reduce is.

First each rank writes its name into the key/value store of the process group, so that the check can name missing ranks.
Then the ranks form the group that training would use, and run an all-reduce. A collective operation that hangs raises
no error, so it runs in a thread. Meanwhile every rank increments its counter in the store. If a counter stops, its rank
has died, and the other ranks are waiting for it.
"""

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from tarflow_scale.errors import UserError
from tarflow_scale.runtime.processes import die_with_parent

if TYPE_CHECKING:
    from torch import device as Device
    from torch.distributed import Store, TCPStore

__all__ = ["RollCall", "call_roll", "meet", "on_this_machine"]

_CPU_BYTES, _CUDA_BYTES = 16 * 1024**2, 256 * 1024**2
"""Size of the all-reduced tensor on CPUs and on GPUs. Training on GPUs sends gradients in buckets of up to 200 MB."""
_ROUNDS = 3
_POLL_SECONDS = 0.1
_PULSE_SECONDS = 3.0
_LEAVE_SECONDS = 5.0


@dataclass(frozen=True)
class RollCall:
    """The result of a roll call on one rank."""

    hosts: dict[int, str]
    """Name of the machine of each rank that answered, by rank."""
    missing: tuple[int, ...] = ()
    """Ranks that did not answer in time."""
    silent: tuple[int, ...] = ()
    """Ranks that answered and then died."""
    stuck: tuple[int, ...] = ()
    """Ranks that are alive, but on which the all-reduce did not end."""
    failures: dict[int, str] = field(default_factory=dict[int, str])
    """Error message of each failed all-reduce, by rank."""
    num_bytes: int = 0
    """Size of the reduced tensor."""
    bytes_per_second: float | None = None
    """Bus bandwidth as nccl-tests defines it: 2 (N - 1) / N times the size of the tensor, divided by the seconds."""


def meet(rank: int, host: str, port: int, hosted_here: bool, timeout_seconds: float) -> "TCPStore":
    """Connect to the key/value store of the ranks.

    Args:
        rank: rank of this process.
        host: MASTER_ADDR.
        port: MASTER_PORT.
        hosted_here: whether this process serves the store; torchrun's agent may do so instead.
        timeout_seconds: how long to wait for the server.

    Raises:
        UserError: the server does not answer, or this process cannot listen at the port.
    """
    import torch.distributed as dist

    patience = timedelta(seconds=timeout_seconds)
    try:
        return dist.TCPStore(host, port, None, hosted_here, patience, wait_for_workers=False)
    except (dist.DistError, RuntimeError) as error:
        if hosted_here:
            raise UserError(
                f"rank {rank} cannot listen at port {port} ({_first_line(error)}); choose another port"
            ) from error
        raise UserError(
            f"rank 0 must answer at {host}:{port} (rank {rank} got no answer within {timeout_seconds:g} s); start rank "
            f"0, and open the port between the hosts"
        ) from error


def call_roll(
    store: "Store", rank: int, world_size: int, device: "Device", backend: str, name: str, timeout_seconds: float
) -> RollCall:
    """Wait for the other ranks, form the process group and run an all-reduce.

    Args:
        store: the key/value store, see `meet`.
        rank: rank of this process.
        world_size: number of ranks.
        device: device of this rank.
        backend: ``gloo`` or ``nccl``.
        name: name of this machine.
        timeout_seconds: time limit for the answers of all ranks; the all-reduce has the same limit.
    """
    import torch.distributed as dist

    store = dist.PrefixStore(f"roll-call-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    ranks = range(world_size)
    store.set(f"here/{rank}", name)
    missing = _await(lambda: _without(store, "here", ranks), timeout_seconds)
    hosts = {other: store.get(f"here/{other}").decode() for other in ranks if other not in missing}
    if missing:
        _leave(store, rank, len(hosts))
        return RollCall(hosts, missing=tuple(missing))

    outcome = _in_background(store, rank, world_size, device, backend, timeout_seconds)

    def unfinished() -> list[int]:
        store.add(f"pulse/{rank}", 1)
        return _without(store, "ended", ranks)

    late = _await(unfinished, timeout_seconds)
    silent: list[int] = []
    if late:
        before = {other: store.add(f"pulse/{other}", 0) for other in late}
        _await(unfinished, _PULSE_SECONDS)
        silent = [other for other in late if other != rank and store.add(f"pulse/{other}", 0) == before[other]]
    messages = {other: store.get(f"ended/{other}").decode() for other in ranks if other not in late}
    _leave(store, rank, len(hosts) - len(silent))
    return RollCall(
        hosts,
        silent=tuple(silent),
        stuck=tuple(other for other in late if other not in silent),
        failures={other: text for other, text in messages.items() if text != "well"},
        num_bytes=_num_bytes(device),
        bytes_per_second=outcome.get("bytes_per_second"),
    )


def on_this_machine(num_ranks: int, timeout_seconds: float) -> RollCall:
    """Start gloo ranks on this machine, run a roll call, and return the result of rank 0.

    The ranks are forks of the calling process, which must not have used torch yet.

    Raises:
        UserError: rank 0 did not answer.
    """
    import torch
    import torch.distributed as dist

    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe() for _ in range(num_ranks)]
    ranks = [
        context.Process(target=_be_rank, args=(rank, num_ranks, pipe[1], timeout_seconds), daemon=True)
        for rank, pipe in enumerate(pipes)
    ]
    for process in ranks:
        process.start()
    for _, end in pipes:
        end.close()
    store = dist.TCPStore(
        "127.0.0.1", 0, None, True, wait_for_workers=False
    )  # after the forks, because it starts a thread
    for pipe, _ in pipes:
        pipe.send(store.port)
    outcome = "no answer in time"
    try:
        if pipes[0][0].poll(2 * timeout_seconds + _PULSE_SECONDS + _LEAVE_SECONDS):
            return pipes[0][0].recv()
    except EOFError:
        outcome = "an exit without a message"
    finally:
        for process in ranks:
            process.kill()
            process.join()
    raise UserError(
        f"rank 0 of {num_ranks} on this machine must answer (got {outcome}); check the installation of "
        f"torch {torch.__version__}"
    )


def _be_rank(rank: int, num_ranks: int, pipe: Connection, timeout_seconds: float) -> None:
    import torch

    die_with_parent()
    torch.set_num_threads(1)
    store = meet(rank, "127.0.0.1", pipe.recv(), False, timeout_seconds)
    pipe.send(call_roll(store, rank, num_ranks, torch.device("cpu"), "gloo", "this machine", timeout_seconds))
    os._exit(0)  # threads of gloo may abort a process that shuts down


def _without(store: "Store", key: str, ranks: Iterable[int]) -> list[int]:
    return [rank for rank in ranks if not store.check([f"{key}/{rank}"])]


def _await(remaining: Callable[[], list[int]], timeout_seconds: float) -> list[int]:
    """Call ``remaining`` until it returns no ranks or time runs out; return the ranks that remain."""
    deadline = time.monotonic() + timeout_seconds
    while (rest := remaining()) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    return rest


def _in_background(
    store: "Store", rank: int, world_size: int, device: "Device", backend: str, timeout_seconds: float
) -> dict[str, float]:
    """Start an all-reduce in a thread, which writes the outcome to the store and the speed into the returned dict."""
    speed: dict[str, float] = {}
    own = store.clone()  # a separate client, because a client that waits blocks all its users

    def work() -> None:
        try:
            speed["bytes_per_second"] = _all_reduce(own, rank, world_size, device, backend, timeout_seconds)
            message = "well"
        except Exception as error:
            message = _first_line(error)
        own.set(f"ended/{rank}", message)

    threading.Thread(target=work, daemon=True).start()
    return speed


def _all_reduce(
    store: "Store", rank: int, world_size: int, device: "Device", backend: str, timeout_seconds: float
) -> float:
    import torch
    import torch.distributed as dist

    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("group", store),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_seconds),
    )
    fastest = float("inf")
    for _ in range(1 + _ROUNDS):  # the first round makes the connections
        values = torch.full((_num_bytes(device) // 4,), float(rank + 1), device=device)
        _synchronize(device)
        started = time.perf_counter()
        dist.all_reduce(values)
        _synchronize(device)
        fastest = min(fastest, time.perf_counter() - started)
        total = world_size * (world_size + 1) / 2
        if values.min().item() != total or values.max().item() != total:
            raise RuntimeError(f"the sum over ranks must be {total:g} (got {values.min():g} to {values.max():g})")
    return 2 * (world_size - 1) / world_size * _num_bytes(device) / fastest


def _synchronize(device: "Device") -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def _num_bytes(device: "Device") -> int:
    return _CUDA_BYTES if device.type == "cuda" else _CPU_BYTES


def _leave(store: "Store", rank: int, num_ranks: int) -> None:
    """Tell the store that this rank is done. Rank 0 waits for all other ranks, because it may serve the store."""
    store.add("left", 1)
    if rank == 0:
        _await(lambda: [] if store.add("left", 0) >= num_ranks else [0], _LEAVE_SECONDS)


def _first_line(error: Any) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
