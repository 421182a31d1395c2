"""A pool of workers that run units of work, on Ray or in this process, until all units are done."""

import importlib
import logging
import os
import pickle
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self, TypeVar

from tarflow_scale.errors import ConfigError, UserError
from tarflow_scale.pool.address import check_token, on_loopback_alone, temporary_folder
from tarflow_scale.pool.look import look_at
from tarflow_scale.runtime import console, cores, streams

__all__ = ["OBJECT_STORE_BYTES", "Pool", "Unit", "Worker"]


class Worker(Protocol):
    """Interface of a worker; the pool constructs one worker per actor."""

    def run(self, unit: Any) -> Any:
        """Do one unit of work and return a small, picklable result."""
        ...


class Unit(Protocol):
    """A unit of work. Its result is stored, so that a killed job can continue where it stopped."""

    @property
    def num_images(self) -> int:
        """Number of images that the unit generates or measures."""
        ...


T = TypeVar("T")
U = TypeVar("U", bound=Unit)
_PATIENCE, _LEAST_PATIENCE_SECONDS = 3.0, 10.0
"""An idle worker repeats an unfinished unit if no unit has finished for 3 times the longest run time so far, or for
10 s if that is longer."""
_POLL_SECONDS = 0.5
OBJECT_STORE_BYTES = 256 * 1024**2
"""Size of the object store of a cluster that the pool starts. It can be small, because workers return records and
statistics, never images."""


class Pool:
    """A pool of workers. At the end of the ``with`` block, it stops the workers and any Ray cluster that it started.

    Args:
        executor: ``ray`` runs the work on Ray actors; ``local`` runs it in this process.
        address: address of a running cluster; None starts a cluster that listens on loopback.
        num_workers: maximum number of actors; the pool never starts more actors than there are units.
        cpus_per_worker: number of cores per actor, and of threads for its numerical libraries.
        gpus_per_worker: number of GPUs per actor.
        start_seconds: maximum time to wait until the cluster answers and has the resources for all workers.

    Raises:
        ConfigError: the cluster is on another machine and has no token authentication.
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
        """Run every unit until it has succeeded once; yield ``(unit, result)`` in the order in which units finish.

        Args:
            worker_class: class of the workers, constructed with ``arguments``.
            arguments: keyword arguments of a worker, small and picklable.
            units: the units to run.

        Raises:
            UserError: a worker raised a `UserError`, or the cluster is too small.
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

    def run_missing(
        self,
        worker_class: type[Worker],
        arguments: dict[str, Any],
        units: Sequence[U],
        missing: Sequence[U],
        description: str,
        note: Callable[[], str] = str,
    ) -> Generator[tuple[U, Any]]:
        """Run the missing units of a job as `run` does, with a progress bar that counts the images of all units.

        The function ``note`` is called after every unit, and returns a text for the bar.
        """
        total, remaining = (sum(unit.num_images for unit in group) for group in (units, missing))
        with console.ProgressBar(total, description, initial=total - remaining) as bar:
            for unit, result in self.run(worker_class, arguments, missing):
                bar.update(unit.num_images)
                yield unit, result
                bar.tell(note())


class _Host:
    """A Ray actor with one worker. The first `run` constructs the worker, so that its errors reach the driver.

    Args:
        pickled: class and arguments of the worker. They are unpickled only after the environment is set, because
            unpickling imports torch, and torch reads the environment when it is imported.
    """

    def __init__(self, pickled: bytes) -> None:
        streams.guard()
        cores.spin_briefly()
        self._pickled = pickled
        self._worker: Worker | None = None

    def run(self, unit: Any) -> Any:
        if self._worker is None:
            worker_class, arguments = pickle.loads(self._pickled)  # noqa: S301 - from the driver, like the units
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
    starting = {actor.__ray_ready__.remote(): actor for actor in actors}  # gets units only once it is placed on a node
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
        # If the node of an actor died, the actor may wait forever for another, so an idle actor also runs its unit.
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
    # The next workers need these cores. If the job ends early, the actors are not killed here but stopped by the pool:
    # when a busy actor is killed, Ray prints that its unit will be retried.
    for actor in actors:
        ray.kill(actor)


@dataclass(frozen=True)
class _Attempt:
    """One attempt of an actor at the unit with index ``number``."""

    actor: Any
    number: int
    started: float


def _start(address: str | None, num_workers: int, cpus: int, gpus: int, start_seconds: float) -> None:
    deadline = time.monotonic() + start_seconds
    # Ray reads both variables when it is imported. The first makes it use loopback only, as it does on laptops; the
    # second lets the workers of our own cluster run at normal priority.
    alone = _patiently(deadline, lambda: _reached(address))
    if alone:
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    if address is None:
        os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - Ray's own spelling
    import ray

    constants: Any = importlib.import_module("ray._private.ray_constants")
    constants.ENABLE_RAY_CLUSTER = not alone  # the variable has no effect if Ray was imported earlier
    options: dict[str, Any] = {"address": address}
    if address is None:
        options = {
            "address": "local",  # never another user's cluster on this machine
            "num_cpus": max(num_workers * cpus, 1),
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
        }
    try:
        ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # Ray raises plain exceptions too, for instance if a node starts too slowly
        ray.shutdown()  # stops the processes of our own cluster that have started
        raise _refusal(error, address) from error
    try:
        _patiently(deadline, lambda: _check_size(ray.cluster_resources(), num_workers, cpus, gpus))
    except UserError:
        ray.shutdown()
        raise


def _refusal(error: Exception, address: str | None) -> UserError:
    """Convert an error of `ray.init` to one line that says what to do."""
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
        f"the Ray cluster at {address} must accept this process (got: {got}); use the same versions of Ray "
        f"and Python as the cluster"
    )


def _reached(address: str | None) -> bool:
    """Whether a cluster listens only on loopback. A running cluster must also answer and accept the token."""
    if address is not None:
        look_at(address)
    return on_loopback_alone(address)


def _patiently(deadline: float, look: Callable[[], T]) -> T:
    """Return the result of ``look``. Until the deadline, retry after every `UserError` except a `ConfigError`."""
    while True:
        try:
            return look()
        except ConfigError:
            raise
        except UserError:
            if time.monotonic() > deadline:
                raise
        time.sleep(_POLL_SECONDS)


def _check_size(resources: Mapping[str, float], num_workers: int, cpus: int, gpus: int) -> None:
    for name, needed in (("CPU", num_workers * cpus), ("GPU", num_workers * gpus)):
        if needed > resources.get(name, 0):
            raise UserError(
                f"the cluster must have {needed} {name}s for {num_workers} workers (got {resources.get(name, 0):g}); "
                f"lower cluster.num_workers or cluster.{name.lower()}s_per_worker, or raise cluster.start_seconds if "
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
