"""A function over many inputs, in this process or in several."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from tarflow_scale.errors import UserError
from tarflow_scale.processes import die_with_parent

__all__ = ["in_workers"]

T = TypeVar("T")
R = TypeVar("R")


def in_workers(function: Callable[[T], R], inputs: Sequence[T], num_workers: int) -> Iterator[R]:
    """Results in the order of the inputs; so are errors, whoever is faster.

    Args:
        function: of a module, or a `functools.partial` of one, so that it can be pickled.
        inputs: what it is applied to.
        num_workers: processes; with one, or one input, everything happens here.

    Raises:
        UserError: a worker was killed.
    """
    if num_workers <= 1 or len(inputs) <= 1:
        yield from map(function, inputs)
        return
    context = multiprocessing.get_context("spawn")  # a fork would share open files and the threads of stores
    pool = ProcessPoolExecutor(min(num_workers, len(inputs)), context, initializer=die_with_parent)
    try:
        yield from pool.map(function, inputs)
    except BrokenProcessPool as error:
        raise UserError(
            f"a worker process died ({error}); is memory short? lower shards.num_workers and run it again"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
