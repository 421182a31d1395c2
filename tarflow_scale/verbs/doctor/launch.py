"""Check environment variables that would make NCCL, gloo or the rendezvous of ranks hang."""

import errno
import os
import socket

from tarflow_scale.config.base import absent_here
from tarflow_scale.runtime import distributed
from tarflow_scale.verbs.doctor.finding import Finding, failed, ok, warning

__all__ = ["environment"]

_SLOW = {
    "NCCL_P2P_DISABLE": "GPUs of one machine talk through main memory",
    "NCCL_SHM_DISABLE": "ranks of one machine talk through the network",
    "NCCL_IB_DISABLE": "InfiniBand is not used",
}
_LOOPBACK = "lo"


def environment() -> list[Finding]:
    """Check the variables; report the first problem or, if there is none, the variables that are set."""
    for look in (_interfaces, _rendezvous, _counts):
        if finding := look():
            return [finding]
    if os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING") == "0":
        problem = "TORCH_NCCL_ASYNC_ERROR_HANDLING=0, so if a rank dies, the other ranks wait forever"
        return [warning("launch", problem, "unset it")]
    for name, meaning in _SLOW.items():
        if os.environ.get(name) == "1":
            return [warning("launch", f"{name}=1: {meaning}", "unset it, unless you need it")]
    own = ("NCCL_", "GLOO_", "MASTER_")
    names = sorted(name for name in os.environ if name.startswith(own) or name in ("RANK", "WORLD_SIZE"))
    return [
        ok(
            "launch",
            ", ".join(f"{name}={os.environ[name]}" for name in names) or "no variables for NCCL, gloo or ranks are set",
        )
    ]


def _interfaces() -> Finding | None:
    """Check the variables that select network interfaces.

    NCCL_SOCKET_IFNAME lists prefixes of interface names. A leading ``=`` makes them full names, and a leading ``^``
    excludes them. GLOO_SOCKET_IFNAME lists full names.
    """
    there = [name for _, name in socket.if_nameindex()]
    far = distributed.world_size() > distributed.local_world_size()
    for variable, exact in (("NCCL_SOCKET_IFNAME", False), ("GLOO_SOCKET_IFNAME", True)):
        asked = os.environ.get(variable, "")
        if not asked:
            continue
        advice = f"set it to one of {', '.join(there)}, or unset it"
        matching = [name for name in there if name in asked.split(",")] if exact else _matching(asked, there)
        if not matching or (exact and len(matching) < len(asked.split(","))):
            return failed("launch", f"{variable}={asked} is not a network interface of this machine", advice)
        if far and matching == [_LOOPBACK]:
            return failed("launch", f"{variable}={asked} cannot reach ranks on other machines", advice)
    return None


def _matching(asked: str, there: list[str]) -> list[str]:
    excludes = asked.startswith("^")
    asked = asked.removeprefix("^")
    exact = asked.startswith("=")
    words = asked.removeprefix("=").split(",")
    chosen = [name for name in there if any(name == word if exact else name.startswith(word) for word in words)]
    return [name for name in there if name not in chosen] if excludes else chosen


def _rendezvous() -> Finding | None:
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if "RANK" in os.environ and not (host and port):
        missing = " and ".join(name for name, value in (("MASTER_ADDR", host), ("MASTER_PORT", port)) if not value)
        advice = f"set {missing} on every rank, or start the ranks with launch/torchrun.sh"
        if absent := absent_here(advice):
            advice = f"{advice}; {absent}"
        return failed("launch", f"RANK is set and {missing} is not", advice)
    if host:
        try:
            socket.getaddrinfo(host, None)
        except OSError as error:
            advice = "set it to the address of rank 0's host, or add the name to DNS or /etc/hosts"
            return failed("launch", f"MASTER_ADDR={host} has no address ({error.strerror})", advice)
    if not port:
        return None
    if not (port.isdigit() and 0 < int(port) < 2**16):
        return failed("launch", f"MASTER_PORT={port} is not a port", "set it to a number from 1024 to 65535")
    if distributed.rank() != 0 or distributed.agent_serves_store():
        return None
    if reason := _taken(int(port)):
        return failed(
            "launch",
            f"rank 0 cannot listen at MASTER_PORT={port} ({reason})",
            "choose another port, the same on every rank",
        )
    return None


def _taken(port: int) -> str:
    """The reason why the port cannot be used; empty if it can be used."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's store does
        try:
            probe.bind(("", port))
            probe.listen()
        except OSError as error:
            return "another process listens there" if error.errno == errno.EADDRINUSE else str(error.strerror)
    return ""


def _counts() -> Finding | None:
    rank, ranks = distributed.rank(), distributed.world_size()
    if not 0 <= rank < ranks:
        return failed(
            "launch", f"RANK={rank} is not a rank of WORLD_SIZE={ranks}", "number ranks from 0 to WORLD_SIZE - 1"
        )
    return None
