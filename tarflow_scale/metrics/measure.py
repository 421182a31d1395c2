"""Numbers from features, in rounds of tasks that run on the same workers as everything else.

A measure is a generator: it yields tasks, is sent their results in the same order, and returns the number. Tasks read
features and return sums; all measures of an evaluation go through their rounds together.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

__all__ = ["Measure", "Measured", "Reducer", "Task", "in_rounds"]


class Task(Protocol):
    """A picklable piece of a measure."""

    def run(self) -> Any:
        """Return something small."""
        ...


@dataclass(frozen=True)
class Measured:
    """A number with its jackknife standard error."""

    value: float
    standard_error: float


Measure = Generator[Sequence[Task], list[Any], Measured]
Run = Callable[[list[tuple[int, Task]]], Iterator[tuple[tuple[int, Task], Any]]]
"""Runs numbered tasks in any order."""


class Reducer:
    """The worker that runs tasks."""

    def __init__(self, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)

    def run(self, unit: tuple[int, Task]) -> Any:
        """Run one."""
        return unit[1].run()


def in_rounds(measures: dict[str, Measure], run: Run) -> dict[str, Measured]:
    """Go through all rounds of all measures, every round's tasks together.

    Args:
        measures: by name.
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
        tasks = list(enumerate(task for several in asked.values() for task in several))
        found = {number: result for (number, _), result in run(tasks)}
        ordered = iter(found[number] for number, _ in tasks)
        waiting = {name: [next(ordered) for _ in several] for name, several in asked.items()}
    return done
