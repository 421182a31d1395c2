"""Cores that this process may use, threads that compute on them, and how those threads wait for each other."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

__all__ = ["num_cores", "num_threads", "spin_briefly"]

_SPINS = "1000"
"""Iterations of GNU's OpenMP runtime, some tens of microseconds; its default is 300,000."""


def num_cores(system: Path = Path("/")) -> int:
    """Cores that this process may use: its affinity, and the CPU quotas of its control group and of those above it.

    Args:
        system: root of the file system, where ``/proc`` and ``/sys`` are.
    """
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return min([cores, *(max(1, -(-quota // period)) for quota, period in _quotas(system))])


def _quotas(system: Path) -> Iterator[tuple[int, int]]:
    """Microseconds of CPU time in each period of so many, of both versions of Linux's control groups.

    A container may see its group's path on the host, and only its own group's files at the top of the hierarchy.
    """
    groups = system / "proc/self/cgroup"
    for line in groups.read_text(encoding="utf-8").splitlines() if groups.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = system / "sys/fs/cgroup" / ("cpu" if controllers else "")
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            found = _quota(folder, is_first_version=bool(controllers))
            if found is not None:
                yield found
            if folder == top:
                break


def _quota(folder: Path, is_first_version: bool) -> tuple[int, int] | None:
    """Quota and period of one control group; None where it has none, as the root, or is not seen in a container."""
    try:
        if is_first_version:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        else:
            quota, period = (folder / "cpu.max").read_text().split()
    except OSError:
        return None
    return (int(quota), int(period)) if quota != "max" and int(quota) > 0 else None  # version 1 says -1 for none


def num_threads(asked: int, num_ranks: int) -> int:
    """Threads with which torch computes in a rank on a CPU.

    Args:
        asked: by the configuration; 0 leaves it to ``OMP_NUM_THREADS``, and where that is not set, or is no number, to
            the rank's share of the cores.
        num_ranks: on this machine.
    """
    if asked:
        return asked
    outermost = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if outermost.isdecimal() and int(outermost):
        return int(outermost)
    return max(1, num_cores() // num_ranks)


def spin_briefly() -> None:
    """Let threads of OpenMP that wait for each other sleep soon, unless the user has said how they wait.

    Must run before torch is imported, whose GNU runtime reads it when it is loaded. By default a thread that has
    finished its part spins for milliseconds. Where another program holds one of the cores, the spinning takes that time
    from the very thread that is waited for, and two threads are slower than one. Without any spinning each region waits
    for a thread to wake up, which slows training on a quiet machine. ``evals/results/busy-cores-cpu.json`` has both.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
