"""Units of work on Ray actors, or in this process. The only user of ray.

A worker is a class with ``__init__(**arguments)`` and ``run(unit) -> result``; its module must be importable on the
worker. A unit must be idempotent, because a lost worker's unit runs again, and a late one's may run twice. Results come
in the order in which units finish; they must not depend on the worker, so both executors give the same answer.

A cluster elsewhere is reached by its address (``host:port``, or ``ray://host:port``), and only with Ray's token
authentication switched on here and there: whoever may submit work to a cluster may run code on it.
"""

import importlib
import ipaddress
import logging
import os
import re
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, Self, TypeVar

from tarflow_scale.errors import ConfigError, UserError

__all__ = ["OBJECT_STORE_BYTES", "ClusterFacts", "Pool", "Worker", "look_at"]

T = TypeVar("T")


class Worker(Protocol):
    """What a pool runs."""

    def run(self, unit: Any) -> Any:
        """Do one unit of work and return a small result."""
        ...


_PATIENCE, _LEAST_PATIENCE_SECONDS = 3.0, 10.0
"""An idle worker takes a unit from another that has had it for so many times the longest that any took."""
_CONNECT_SECONDS = 10.0
_POLL_SECONDS = 0.5
OBJECT_STORE_BYTES = 256 * 1024**2
"""Of a cluster of our own. Results are records and moments, never images, so a small store is enough."""


class Pool:
    """Workers, for as long as the ``with`` block lasts; a Ray cluster of our own ends with it.

    Args:
        executor: ``ray`` for actors; ``local`` runs all work in this process.
        address: a running cluster, or None for one on this machine's loopback, which ends with the pool.
        num_workers: actors; never more than units.
        cpus_per_worker: cores, and threads of numerical libraries, of an actor.
        gpus_per_worker: GPUs of an actor.
        start_seconds: how long to wait for a cluster to answer and to have what the workers need.

    Raises:
        ConfigError: a cluster elsewhere without token authentication.
    """

    def __init__(
        self,
        executor: Literal["ray", "local"],
        address: str | None = None,
        num_workers: int = 1,
        cpus_per_worker: int = 1,
        gpus_per_worker: int = 0,
        start_seconds: float = 0.0,
    ) -> None:
        self._executor = executor
        self._address = address = None if address == "local" else address
        self._num_workers, self._cpus, self._gpus = num_workers, cpus_per_worker, gpus_per_worker
        self._start_seconds = start_seconds
        self._started = False
        if executor == "ray" and address is not None:
            _check_token(address)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._started:
            import ray

            ray.shutdown()

    def run(
        self, worker_class: type[Worker], arguments: dict[str, Any], units: Sequence[Any]
    ) -> Iterator[tuple[Any, Any]]:
        """Run every unit once to success; yield ``(unit, result)`` as they finish.

        Args:
            worker_class: the worker; built once a worker with ``arguments``.
            arguments: keyword arguments of the worker, small and picklable.
            units: the work; there are never more actors than units.

        Raises:
            UserError: when a worker raises one, which is passed on as it was; when the cluster is too small.
        """
        if not units:
            return
        if self._executor == "local":
            worker = worker_class(**arguments)
            for unit in units:
                yield unit, worker.run(unit)
            return
        if not self._started:
            _start(self._address, self._num_workers, self._cpus, self._gpus, self._start_seconds)
            self._started = True
        num_workers = min(self._num_workers, len(units))
        yield from _run_on_ray(worker_class, arguments, units, num_workers, self._cpus, self._gpus)


class _Host:
    """An actor: builds its worker with the first unit, so that a mistake in building it comes back as an answer."""

    def __init__(self, worker_class: type[Worker], arguments: dict[str, Any]) -> None:
        self._worker_class = worker_class
        self._arguments = arguments
        self._worker: Worker | None = None

    def run(self, unit: Any) -> Any:
        if self._worker is None:
            self._worker = self._worker_class(**self._arguments)
        return self._worker.run(unit)


def _run_on_ray(
    worker_class: type[Worker],
    arguments: dict[str, Any],
    units: Sequence[Any],
    num_workers: int,
    cpus: int,
    gpus: int,
) -> Iterator[tuple[Any, Any]]:
    import ray

    host: Any = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=-1, max_task_retries=-1)(_Host)
    actors = [host.remote(worker_class, arguments) for _ in range(num_workers)]
    starting = {actor.__ray_ready__.remote(): actor for actor in actors}  # one without a place holds up nothing
    idle: list[Any] = []
    waiting = list(reversed(range(len(units))))
    attempts: dict[Any, _Attempt] = {}
    longest = 0.0

    def give(number: int) -> None:
        actor = idle.pop()
        attempts[actor.run.remote(units[number])] = _Attempt(actor, number, time.monotonic())

    try:
        while waiting or attempts:
            while waiting and idle:
                give(waiting.pop())
            # An actor whose node is gone waits for another node, perhaps for good: then an idle one takes its unit too.
            patience = max(_PATIENCE * longest, _LEAST_PATIENCE_SECONDS) if idle else None
            done, _ = ray.wait([*starting, *attempts], num_returns=1, timeout=patience)
            if not done:
                tried = Counter(attempt.number for attempt in attempts.values())
                give(min(attempts.values(), key=lambda attempt: (tried[attempt.number], attempt.started)).number)
                continue
            if done[0] in starting:
                idle.append(starting.pop(done[0]))
                continue
            first = attempts.pop(done[0])
            longest = max(longest, time.monotonic() - first.started)
            idle.append(first.actor)
            attempts = {ref: attempt for ref, attempt in attempts.items() if attempt.number != first.number}
            yield units[first.number], _result(done[0])
    finally:
        for actor in actors:
            ray.kill(actor)  # the next workers need their cores


@dataclass(frozen=True)
class _Attempt:
    """The unit of this number, given to an actor."""

    actor: Any
    number: int
    started: float


def _host_and_port(address: str) -> tuple[str, str]:
    """Of ``host:port``, ``[host]:port`` or ``ray://host:port``; a word such as ``auto`` is a host."""
    host, _, port = re.sub(r"^ray://", "", address).rpartition(":")
    return (host.strip("[]"), port) if host else (address, "")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _found_by_ray() -> str | None:
    """The cluster that ``auto`` means: what ``RAY_ADDRESS`` says, or the one that was started on this machine last."""
    known = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")  # noqa: S108 - Ray's own place
    return os.environ.get("RAY_ADDRESS") or (known.read_text(encoding="utf-8").strip() if known.is_file() else None)


def _check_token(address: str) -> None:
    """Refuse another machine's cluster unless Ray will show it a token."""
    here = False
    if address == "auto":
        address = _found_by_ray() or "localhost"
        here = _host_and_port(address)[0] == _own_address()  # it was started on this machine
    here = here or _is_loopback(_host_and_port(address)[0])
    named = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    has_token = bool(named) or (Path.home() / ".ray" / "auth_token").is_file()
    if here or (os.environ.get("RAY_AUTH_MODE") == "token" and has_token):
        return
    raise ConfigError(
        f"cluster.address on another machine needs Ray's token authentication (got {address}); set RAY_AUTH_MODE=token "
        f"and RAY_AUTH_TOKEN_PATH here and on the cluster"
    )


def _answers(host: str, port: str) -> bool:
    try:
        with socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS):
            return True
    except (OSError, ValueError):
        return False


def _own_address() -> str:
    """This machine's address as Ray finds it: that of the way out; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("8.8.8.8", 80))
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def _on_loopback_alone(address: str | None) -> bool:
    """Whether a cluster is, or is to be, on addresses that only this machine has.

    Ray takes a loopback address for this machine's own one, at which such a cluster does not listen.

    Raises:
        UserError: nothing answers there.
    """
    if address is None:
        return True
    if address == "auto":
        address = _found_by_ray()
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


def _start(address: str | None, num_workers: int, cpus: int, gpus: int, start_seconds: float) -> None:
    deadline = time.monotonic() + start_seconds
    # Read by Ray when it is imported. The first makes it use loopback only, as it does on laptops; the second keeps
    # workers of a cluster of our own from yielding to every other process of the machine.
    alone = _patiently(deadline, lambda: _on_loopback_alone(address))
    if alone:
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "error")  # what is told in one line is not told in twenty before it
    if address is None:
        os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - Ray's own spelling
    import ray

    constants: Any = importlib.import_module("ray._private.ray_constants")
    constants.ENABLE_RAY_CLUSTER = not alone  # what the variable says, where Ray had been imported before
    if address is not None:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(
                f"the Ray cluster at {address} must let this process in (got: {str(error).splitlines()[0]}); use the "
                f"port of its head, its versions of Ray and Python, and, where it asks for a token, the same "
                f"RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN"
            ) from error
    else:
        ray.init(
            address="local",  # never somebody else's cluster that happens to run here
            num_cpus=max(num_workers * cpus, 1),
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    try:
        _patiently(deadline, lambda: _check_size(ray.cluster_resources(), num_workers, cpus, gpus))
    except UserError:
        ray.shutdown()
        raise


def _patiently(deadline: float, look: Callable[[], T]) -> T:
    """What ``look`` finds; until the deadline, a `UserError` but for a wrong setting means to look again."""
    while True:
        try:
            return look()
        except ConfigError:
            raise
        except UserError:
            if time.monotonic() > deadline:
                raise
        time.sleep(_POLL_SECONDS)


def _check_size(there: dict[str, float], num_workers: int, cpus: int, gpus: int) -> None:
    for name, needed in (("CPU", num_workers * cpus), ("GPU", num_workers * gpus)):
        if needed > there.get(name, 0):
            raise UserError(
                f"the cluster must have {needed} {name}s for {num_workers} workers (got {there.get(name, 0):g}); lower "
                f"cluster.num_workers or cluster.{name.lower()}s_per_worker, or raise cluster.start_seconds where "
                f"machines are still joining"
            )


def _result(reference: Any) -> Any:
    import ray
    from ray.exceptions import RayTaskError

    try:
        return ray.get(reference)
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, UserError):
            raise cause from None
        raise


@dataclass(frozen=True)
class ClusterFacts:
    """What a running cluster says of itself."""

    ray_version: str
    python_version: str
    num_nodes: int
    num_cpus: float
    num_gpus: float
    here: bool
    """Whether this machine is one of its nodes, without which only ``ray://`` takes work from here."""


def look_at(address: str) -> ClusterFacts | None:
    """Ask a running cluster who it is, with the token that work would be submitted with; nothing is started there.

    Args:
        address: see `Pool`.

    Returns:
        Its facts; None behind ``ray://``, where something answers that tells nothing before it is given work.

    Raises:
        UserError: no token where one is needed, nothing answers, the cluster takes another token, or it has no node.
    """
    _check_token(address)
    _on_loopback_alone(address)
    if address == "auto":
        address = _found_by_ray() or address
    if address.startswith("ray://"):
        return None
    from ray.exceptions import AuthenticationError, RayError

    raylet: Any = importlib.import_module("ray._raylet")
    usage: Any = importlib.import_module("ray._common.usage.usage_lib")
    try:
        client = raylet.GcsClient(address=address)
        versions = usage.get_cluster_metadata(client)
        nodes = [node for node in client.get_all_node_info(timeout=_CONNECT_SECONDS).values() if _is_alive(node)]
    except AuthenticationError as error:
        raise ConfigError(
            f"the cluster at {address} must be shown its own token (got a wrong one or none: {_token_in_words()}); set "
            f"RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file with the token of the cluster"
        ) from error
    except (RayError, RuntimeError, AttributeError) as error:  # Attribute: a server that is none of Ray's
        raise UserError(f"no Ray cluster at {address} ({str(error).splitlines()[0]}); start one") from error
    if not nodes:
        raise UserError(f"the cluster at {address} must have a node that lives (got none); start it again")
    return ClusterFacts(
        ray_version=str(versions["ray_version"]),
        python_version=str(versions["python_version"]),
        num_nodes=len(nodes),
        num_cpus=sum(node.resources_total.get("CPU", 0.0) for node in nodes),
        num_gpus=sum(node.resources_total.get("GPU", 0.0) for node in nodes),
        here=any(_is_own_address(node.node_manager_address) for node in nodes),
    )


def _is_alive(node: Any) -> bool:
    return node.state == type(node).GcsNodeState.Value("ALIVE")


def _is_own_address(host: str) -> bool:
    """Whether this machine has it: only then can one listen there."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        try:
            probe.bind((host, 0))
        except OSError:
            return False
        return True


def _token_in_words() -> str:
    if os.environ.get("RAY_AUTH_MODE") != "token":
        return "none, as RAY_AUTH_MODE is not token"
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        if os.environ.get(name):
            return f"that of {name}"
    return "that of ~/.ray/auth_token"
