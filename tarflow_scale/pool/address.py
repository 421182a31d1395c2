"""Addresses of Ray clusters: whether a cluster is on this machine, and whether it may be used without a token."""

import ipaddress
import os
import re
import socket
from pathlib import Path

from tarflow_scale.errors import ConfigError, UserError

__all__ = [
    "CONNECT_SECONDS",
    "check_token",
    "found_by_ray",
    "is_own_address",
    "on_loopback_alone",
    "temporary_folder",
    "token_in_words",
]

CONNECT_SECONDS = 10.0


def _host_and_port(address: str) -> tuple[str, str]:
    """Host and port of ``host:port``, ``[host]:port`` or ``ray://host:port``; the port of ``auto`` is empty."""
    host, _, port = re.sub(r"^ray://", "", address).rpartition(":")
    return (host.strip("[]"), port) if host else (address, "")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def temporary_folder() -> Path:
    """The folder in which Ray creates the folder ``ray`` for its sockets and files."""
    return Path(os.environ.get("RAY_TMPDIR", os.environ.get("TMPDIR", "/tmp")))  # noqa: S108 - Ray's own place


def found_by_ray() -> str | None:
    """Address of the cluster for ``auto``: ``RAY_ADDRESS``, or the last cluster started on this machine, or None."""
    latest = temporary_folder() / "ray" / "ray_current_cluster"
    return os.environ.get("RAY_ADDRESS") or (latest.read_text(encoding="utf-8").strip() if latest.is_file() else None)


def check_token(address: str) -> None:
    """Refuse a cluster on another machine unless Ray will send a token to it.

    Raises:
        ConfigError: the cluster is on another machine, and token authentication is not set up.
    """
    here = False
    if address == "auto":
        address = found_by_ray() or "localhost"
        here = _host_and_port(address)[0] == _own_address()  # it was started on this machine
    here = here or _is_loopback(_host_and_port(address)[0])
    named = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    has_token = bool(named) or Path("~/.ray/auth_token").expanduser().is_file()
    if here or (os.environ.get("RAY_AUTH_MODE") == "token" and has_token):
        return
    raise ConfigError(
        f"cluster.address on another machine needs Ray's token authentication (got {address}); set RAY_AUTH_MODE=token "
        f"and RAY_AUTH_TOKEN_PATH here and on the cluster"
    )


def _answers(host: str, port: str) -> bool:
    try:
        with socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS):
            return True
    except (OSError, ValueError):
        return False


def _own_address() -> str:
    """This machine's address as Ray determines it: the source address of the route to the internet. Sends no packet."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("8.8.8.8", 80))
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def on_loopback_alone(address: str | None) -> bool:
    """Whether a cluster listens only on loopback; the address None stands for a cluster that the pool will start.

    The caller must pass the answer on to Ray, which by default replaces a loopback address by the network address of
    this machine.

    Raises:
        UserError: nothing answers at the address, or the address has no port.
    """
    if address is None:
        return True
    if address == "auto":
        address = found_by_ray()
        if address is None:
            raise UserError("no Ray cluster was found for cluster.address=auto; start one (ray start --head)")
    host, port = _host_and_port(address)
    if not port:
        raise ConfigError(f"cluster.address must be host:port, ray://host:port or auto (got {address}); add the port")
    if _is_loopback(host) and not address.startswith("ray://") and _answers(_own_address(), port):
        return False
    if not _answers(host, port):
        raise UserError(f"no Ray cluster answers at {address}; start one (ray start --head) or set cluster.address")
    return _is_loopback(host)


def is_own_address(host: str) -> bool:
    """Whether the address belongs to this machine, so that a process here can listen on it."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        try:
            probe.bind((host, 0))
        except OSError:
            return False
        return True


def token_in_words() -> str:
    """Description of the token that this process would send."""
    if os.environ.get("RAY_AUTH_MODE") != "token":
        return "no token, because RAY_AUTH_MODE is not token"
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        if os.environ.get(name):
            return f"the token of {name}"
    return "the token of ~/.ray/auth_token"
