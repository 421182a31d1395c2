"""Actors that take units of work, one after the other, until all are done."""

import importlib
import logging
import os
import pickle
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self, TypeVar

from tarflow_scale.errors import ConfigError, UserError
from tarflow_scale.pool.address import check_token, on_loopback_alone, temporary_folder
from tarflow_scale.pool.look import look_at
from tarflow_scale.runtime import cores, streams

__all__ = ["OBJECT_STORE_BYTES", "Pool", "Worker"]

T = TypeVar("T")


class Worker(Protocol):
    """What a pool runs."""

    def run(self, unit: Any) -> Any:
        """Do one unit of work and return a small result."""
        ...


_PATIENCE, _LEAST_PATIENCE_SECONDS = 3.0, 10.0
"""An idle worker takes a unit from another that has had it for so many times the longest that any took."""
_POLL_SECONDS = 0.5
_GREETING = b"Set ray log level from environment variable"
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
            check_token(address)

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
    """An actor: builds its worker with the first unit, so that a mistake in building it comes back as an answer.

    Args:
        pickled: class and arguments of the worker. They are unpickled by the first unit, because that imports torch,
            which reads the environment when it is loaded.
    """

    def __init__(self, pickled: bytes) -> None:
        streams.guard()
        cores.spin_briefly()
        self._pickled = pickled
        self._worker: Worker | None = None

    def run(self, unit: Any) -> Any:
        if self._worker is None:
            worker_class, arguments = pickle.loads(self._pickled)  # noqa: S301 - from our own driver, as units are
            worker: Worker = worker_class(**arguments)
            self._worker = worker
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
    from ray import cloudpickle

    host: Any = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=-1, max_task_retries=-1)(_Host)
    pickled = cloudpickle.dumps((worker_class, arguments))
    actors = [host.remote(pickled) for _ in range(num_workers)]
    starting = {actor.__ray_ready__.remote(): actor for actor in actors}  # one without a place holds up nothing
    idle: list[Any] = []
    waiting = list(reversed(range(len(units))))
    attempts: dict[Any, _Attempt] = {}
    longest = 0.0

    def give(number: int) -> None:
        actor = idle.pop()
        attempts[actor.run.remote(units[number])] = _Attempt(actor, number, time.monotonic())

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
    # Not where this ends early: the pool ends then, and they with it; killed here, Ray would say of each that its unit
    # may be tried again.
    for actor in actors:
        ray.kill(actor)  # the next workers need their cores


@dataclass(frozen=True)
class _Attempt:
    """The unit of this number, given to an actor."""

    actor: Any
    number: int
    started: float


def _start(address: str | None, num_workers: int, cpus: int, gpus: int, start_seconds: float) -> None:
    deadline = time.monotonic() + start_seconds
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "error")  # what is told in one line is not told in twenty before it
    # Read by Ray when it is imported. The first makes it use loopback only, as it does on laptops; the second keeps
    # workers of a cluster of our own from yielding to every other process of the machine.
    alone = _patiently(deadline, lambda: _reached(address))
    if alone:
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    if address is None:
        os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - Ray's own spelling
    import ray

    constants: Any = importlib.import_module("ray._private.ray_constants")
    constants.ENABLE_RAY_CLUSTER = not alone  # what the variable says, where Ray had been imported before
    options: dict[str, Any] = {"address": address}
    if address is None:
        options = {
            "address": "local",  # never somebody else's cluster that happens to run here
            "num_cpus": max(num_workers * cpus, 1),
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
        }
    try:
        with _without_greeting():
            ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, RuntimeError) as error:
        ray.shutdown()  # of a cluster of our own, what had started
        raise _refusal(error, address) from error
    try:
        _patiently(deadline, lambda: _check_size(ray.cluster_resources(), num_workers, cpus, gpus))
    except UserError:
        ray.shutdown()
        raise


def _refusal(error: Exception, address: str | None) -> UserError:
    """What a user can do about an error of `ray.init`."""
    got = (str(error) or type(error).__name__).splitlines()[0]
    if isinstance(error, OSError) and not isinstance(error, ConnectionError):
        place = temporary_folder() / "ray"
        return UserError(
            f"Ray must be able to keep its sockets and files below {place} (got: {got}); set RAY_TMPDIR to a folder of "
            f"your own with a short path and free space"
        )
    if address is None:
        return UserError(
            f"Ray must start on this machine (got: {got}); look into {temporary_folder()}/ray/session_latest/logs, or "
            f"set cluster.executor=local"
        )
    return UserError(
        f"the Ray cluster at {address} must let this process in (got: {got}); use the versions of Ray and Python that "
        f"it has"
    )


@contextmanager
def _without_greeting() -> Generator[None]:
    """Drop the line in which Ray's core says that it was told how much to say; the rest is passed on."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            said.seek(0)
            for line in said:
                if _GREETING not in line:
                    sys.stderr.write(line.decode(errors="replace"))


def _reached(address: str | None) -> bool:
    """Whether a cluster is on loopback alone; one that is running must answer and take our token."""
    if address is not None:
        look_at(address)
    return on_loopback_alone(address)


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


def _check_size(there: Mapping[str, float], num_workers: int, cpus: int, gpus: int) -> None:
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
