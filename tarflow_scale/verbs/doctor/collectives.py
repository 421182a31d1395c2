"""Roll call: which ranks answer, which do not, and how fast they sum.

Ranks meet twice. First each writes its name into the key/value store that a process group starts from, so that one that
never comes can be named; then they form the group that training would use and all-reduce. A collective that hangs tells
nobody why, so it runs in a thread, while every rank keeps a pulse in the store, by which a rank that died is told from
ranks that wait for it.
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
"""Of the all-reduce: gradients travel in buckets of up to 200 MB on GPUs."""
_ROUNDS = 3
_POLL_SECONDS = 0.1
_PULSE_SECONDS = 3.0
_FAREWELL_SECONDS = 5.0


@dataclass(frozen=True)
class RollCall:
    """What one rank saw."""

    hosts: dict[int, str]
    """Names of the machines of the ranks that came."""
    missing: tuple[int, ...] = ()
    """Ranks that did not come in time."""
    silent: tuple[int, ...] = ()
    """Ranks that came, and then stopped."""
    stuck: tuple[int, ...] = ()
    """Ranks whose all-reduce did not end, though they live."""
    failures: dict[int, str] = field(default_factory=dict[int, str])
    """What went wrong for ranks whose all-reduce failed."""
    num_bytes: int = 0
    """Of the tensor that was summed."""
    bytes_per_second: float | None = None
    """That each rank's link carried, as nccl-tests counts it: 2 (N - 1) / N times the bytes, over the seconds."""


def meet(rank: int, host: str, port: int, hosted_here: bool, timeout_seconds: float) -> "TCPStore":
    """The store that ranks meet in.

    Args:
        rank: of this process.
        host: MASTER_ADDR.
        port: MASTER_PORT.
        hosted_here: whether this process is to serve it; torchrun's agent may do so instead.
        timeout_seconds: how long to wait for its server.

    Raises:
        UserError: it does not answer, or cannot be served.
    """
    import torch.distributed as dist

    patience = timedelta(seconds=timeout_seconds)
    try:
        return dist.TCPStore(host, port, None, hosted_here, patience, wait_for_workers=False)
    except (dist.DistError, RuntimeError) as error:
        if hosted_here:
            raise UserError(
                f"rank {rank} cannot listen at port {port} ({_first_line(error)}); choose another"
            ) from error
        raise UserError(
            f"rank 0 must answer at {host}:{port} (got no answer within {timeout_seconds:g} s, for rank {rank}); start "
            f"it, and let the port through between the hosts"
        ) from error


def call_roll(
    store: "Store", rank: int, world_size: int, device: "Device", backend: str, name: str, timeout_seconds: float
) -> RollCall:
    """Meet the other ranks, form the group and all-reduce.

    Args:
        store: see `meet`.
        rank: of this process.
        world_size: number of ranks.
        device: of this rank's tensors.
        backend: ``gloo`` or ``nccl``.
        name: of this machine.
        timeout_seconds: for each of the two meetings.
    """
    import torch.distributed as dist

    store = dist.PrefixStore(f"roll-call-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    ranks = range(world_size)
    store.set(f"here/{rank}", name)
    missing = _await(lambda: _without(store, "here", ranks), timeout_seconds)
    hosts = {other: store.get(f"here/{other}").decode() for other in ranks if other not in missing}
    if missing:
        _part(store, rank, len(hosts))
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
    words = {other: store.get(f"ended/{other}").decode() for other in ranks if other not in late}
    _part(store, rank, len(hosts) - len(silent))
    return RollCall(
        hosts,
        silent=tuple(silent),
        stuck=tuple(other for other in late if other not in silent),
        failures={other: text for other, text in words.items() if text != "well"},
        num_bytes=_num_bytes(device),
        bytes_per_second=outcome.get("bytes_per_second"),
    )


def on_this_machine(num_ranks: int, timeout_seconds: float) -> RollCall:
    """A roll call of gloo ranks that are started for it, and end with it; of rank 0.

    The calling process must not have used torch yet, because the ranks are forks of it.

    Raises:
        UserError: rank 0 did not answer at all.
    """
    import torch
    import torch.distributed as dist

    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe() for _ in range(num_ranks)]
    ranks = [
        context.Process(target=_be_rank, args=(rank, num_ranks, pipe[1], timeout_seconds), daemon=True)
        for rank, pipe in enumerate(pipes)
    ]
    for one in ranks:
        one.start()
    for _, end in pipes:
        end.close()
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)  # after the forks: it has a thread
    for pipe, _ in pipes:
        pipe.send(store.port)
    found = "no answer in time"
    try:
        if pipes[0][0].poll(2 * timeout_seconds + _PULSE_SECONDS + _FAREWELL_SECONDS):
            return pipes[0][0].recv()
    except EOFError:
        found = "its end, without a word"
    finally:
        for one in ranks:
            one.kill()
            one.join()
    raise UserError(f"rank 0 of {num_ranks} on this machine must answer (got {found}); see torch {torch.__version__}")


def _be_rank(rank: int, num_ranks: int, pipe: Connection, timeout_seconds: float) -> None:
    import torch

    die_with_parent()
    torch.set_num_threads(1)
    store = meet(rank, "127.0.0.1", pipe.recv(), False, timeout_seconds)
    pipe.send(call_roll(store, rank, num_ranks, torch.device("cpu"), "gloo", "this machine", timeout_seconds))
    os._exit(0)  # threads of gloo may abort a process that is taken down


def _without(store: "Store", what: str, ranks: Iterable[int]) -> list[int]:
    return [rank for rank in ranks if not store.check([f"{what}/{rank}"])]


def _await(remaining: Callable[[], list[int]], timeout_seconds: float) -> list[int]:
    """Poll until none remain, or for so long; those that remain."""
    deadline = time.monotonic() + timeout_seconds
    while (rest := remaining()) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    return rest


def _in_background(
    store: "Store", rank: int, world_size: int, device: "Device", backend: str, timeout_seconds: float
) -> dict[str, float]:
    """All-reduce in a thread, which tells the store how it ended, and fills in the speed."""
    found: dict[str, float] = {}
    own = store.clone()  # a client of its own, because one that waits holds up all who use it

    def work() -> None:
        try:
            found["bytes_per_second"] = _all_reduce(own, rank, world_size, device, backend, timeout_seconds)
            words = "well"
        except Exception as error:
            words = _first_line(error)
        own.set(f"ended/{rank}", words)

    threading.Thread(target=work, daemon=True).start()
    return found


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
    for _ in range(1 + _ROUNDS):  # the first one makes the connections
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


def _part(store: "Store", rank: int, num_ranks: int) -> None:
    """Say that this rank has read what it needs. Rank 0 stays until all have, for the store may go with it."""
    store.add("left", 1)
    if rank == 0:
        _await(lambda: [] if store.add("left", 0) >= num_ranks else [0], _FAREWELL_SECONDS)


def _first_line(error: Any) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
