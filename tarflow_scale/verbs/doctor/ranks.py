"""Check that ranks can reach each other: the ranks of a launcher, or a few ranks that the check starts."""

import os
import socket

from tarflow_scale.config.doctor import RanksConfig
from tarflow_scale.errors import UserError
from tarflow_scale.runtime import distributed
from tarflow_scale.verbs.doctor.collectives import RollCall, call_roll, meet, on_this_machine
from tarflow_scale.verbs.doctor.finding import Finding, failed, ok, skipped

__all__ = ["collectives"]

_MIB, _GB = 1024**2, 1e9
_SHOWN = 8


def collectives(config: RanksConfig) -> list[Finding]:
    """Run a roll call and report its result."""
    seconds = config.timeout_seconds
    if "RANK" not in os.environ:
        if config.num_ranks == 0:
            return [skipped("ranks", "ranks.num_ranks is 0")]
        return [_judged(on_this_machine(config.num_ranks, seconds), config.num_ranks, "gloo", seconds)]
    import torch.distributed as dist

    rank, world_size = distributed.rank(), distributed.world_size()
    device = distributed.own_device()
    backend = distributed.backend_of(device)
    hosted_here = rank == 0 and not distributed.agent_serves_store()
    store = meet(rank, os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), hosted_here, seconds)
    try:
        seen = call_roll(store, rank, world_size, device, backend, socket.gethostname(), seconds)
    except dist.DistError as error:  # errors of collectives are in `seen`
        raise UserError(
            "rank 0 must run until all ranks have answered (its store was closed early); see the output of rank 0"
        ) from error
    reporter = min(seen.hosts)
    if rank != reporter:
        return [skipped("ranks", f"rank {reporter} reports the result")]
    return [_judged(seen, world_size, backend, seconds)]


def _judged(seen: RollCall, world_size: int, backend: str, seconds: float) -> Finding:
    hosts = sorted(set(seen.hosts.values()))
    if seen.missing:
        answered = ", ".join(_named(rank, seen) for rank in sorted(seen.hosts)[:_SHOWN])
        missing = f"{_list(seen.missing)} of {world_size} did not answer within {seconds:g} s (answered: {answered})"
        return failed("ranks", missing, "check that its host runs and reaches MASTER_ADDR:MASTER_PORT, or raise "
                      "ranks.timeout_seconds")  # fmt: skip
    if seen.silent:
        dead = ", ".join(_named(rank, seen) for rank in seen.silent[:_SHOWN])
        return failed("ranks", f"{dead} of {world_size} answered and then died", "see the log of that rank")
    advice = "open all ports between the hosts, and name the interface that connects them in NCCL_SOCKET_IFNAME or " \
             "GLOO_SOCKET_IFNAME"  # fmt: skip
    if seen.failures:
        rank, message = min(seen.failures.items())
        return failed("ranks", f"the {backend} all-reduce failed on {_named(rank, seen)} ({message})", advice)
    if seen.stuck or seen.bytes_per_second is None:
        stuck = ", ".join(_named(rank, seen) for rank in seen.stuck[:_SHOWN])
        return failed("ranks", f"the {backend} all-reduce did not end within {seconds:g} s on {stuck}", advice)
    where = f"{len(hosts)} hosts" if len(hosts) > 1 else hosts[0]
    speed = (
        f"of {seen.num_bytes / _MIB:.0f} MiB at {seen.bytes_per_second / _GB:.2f} GB/s" if world_size > 1 else "works"
    )
    return ok("ranks", f"{world_size} {backend} rank{'s' if world_size > 1 else ''} on {where}: all-reduce {speed}")


def _named(rank: int, seen: RollCall) -> str:
    return f"rank {rank} on {seen.hosts[rank]}"


def _list(ranks: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, ranks[:_SHOWN])) + (f" and {len(ranks) - _SHOWN} more" if len(ranks) > _SHOWN else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"
