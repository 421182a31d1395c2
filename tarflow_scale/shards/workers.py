"""Apply a function to many inputs, in this process or in several."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from tarflow_scale.errors import UserError
from tarflow_scale.runtime.processes import die_with_parent

__all__ = ["in_workers"]

T = TypeVar("T")
R = TypeVar("R")


_function_of_worker: list[Callable[[Any], Any]] = []


def in_workers(function: Callable[[T], R], inputs: Sequence[T], num_workers: int) -> Iterator[R]:
    """Apply a function to inputs; yields results, or raises errors, in the order of the inputs.

    Args:
        function: a module-level function, a `functools.partial`, or a method; it must be picklable. Each worker process
            receives it once.
        inputs: the inputs.
        num_workers: number of processes. With one worker or one input, the calling process does the work.

    Raises:
        UserError: a worker process died.
    """
    if num_workers <= 1 or len(inputs) <= 1:
        yield from map(function, inputs)
        return
    context = multiprocessing.get_context("spawn")  # a fork would share open files and the threads of stores
    pool = ProcessPoolExecutor(min(num_workers, len(inputs)), context, initializer=_start, initargs=(function,))
    try:
        yield from pool.map(_apply, inputs)
    except BrokenProcessPool as error:
        raise UserError(  # not DataError, after which `prepare` would delete the shards that are packed
            f"a worker process died ({error}), perhaps because memory ran out; lower shards.num_workers, and run the "
            f"command again to continue"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start(function: Callable[[Any], Any]) -> None:
    die_with_parent()
    _function_of_worker[:] = [function]


def _apply(value: Any) -> Any:
    return _function_of_worker[0](value)
