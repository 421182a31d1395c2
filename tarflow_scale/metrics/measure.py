"""Compute numbers from features in rounds of tasks, which run on workers.

A measure is a generator. It yields tasks, receives their results in the same order, and finally returns the number.
Tasks read features and return sums. Each round runs the tasks of all measures of an evaluation together.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

__all__ = ["Measure", "Measured", "Reducer", "Task", "in_rounds"]


class Task(Protocol):
    """A picklable step in the computation of a measure."""

    def run(self) -> Any:
        """Compute the result, which should be small because it is sent to the driver."""
        ...


@dataclass(frozen=True)
class Measured:
    """A number with its jackknife standard error."""

    value: float
    standard_error: float


Measure = Generator[Sequence[Task], list[Any], Measured]
Run = Callable[[list[tuple[int, Task]]], Iterator[tuple[tuple[int, Task], Any]]]
"""Runs numbered tasks in any order, and yields each task with its result."""


class Reducer:
    """The worker that runs tasks."""

    def __init__(self, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)

    def run(self, unit: tuple[int, Task]) -> Any:
        """Run one task."""
        return unit[1].run()


def in_rounds(measures: dict[str, Measure], run: Run) -> dict[str, Measured]:
    """Compute all measures. Each round runs the next tasks of all measures together.

    Args:
        measures: measures by name.
        run: runs tasks on workers.
    """
    done: dict[str, Measured] = {}
    waiting: dict[str, list[Any] | None] = dict.fromkeys(measures)
    while waiting:
        asked: dict[str, Sequence[Task]] = {}
        for name, results in waiting.items():
            try:
                asked[name] = next(measures[name]) if results is None else measures[name].send(results)
            except StopIteration as stop:
                done[name] = stop.value
        tasks = list(enumerate(task for of_measure in asked.values() for task in of_measure))
        results_by_number = {number: result for (number, _), result in run(tasks)}
        ordered = iter(results_by_number[number] for number, _ in tasks)
        waiting = {name: [next(ordered) for _ in of_measure] for name, of_measure in asked.items()}
    return done
