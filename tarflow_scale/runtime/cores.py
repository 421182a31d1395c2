"""CPU cores: how many this process may use, the number of threads, and how threads wait for each other."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

__all__ = ["num_cores", "num_threads", "spin_briefly"]

_SPINS = "1000"
"""Number of spin iterations (some tens of microseconds in total) before a waiting thread of GNU's OpenMP runtime
sleeps. The default of the runtime is 300,000."""


def num_cores(system: Path = Path("/")) -> int:
    """Number of cores that this process may use.

    This is the minimum of its CPU affinity and the CPU quotas of its control group and of all parent groups.

    Args:
        system: root of the file system with ``/proc`` and ``/sys``.
    """
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return min([cores, *(max(1, -(-quota // period)) for quota, period in _quotas(system))])


def _quotas(system: Path) -> Iterator[tuple[int, int]]:
    """Yield the CPU quota of each control group (version 1 or 2) as a pair (CPU time, period), in microseconds.

    In a container, ``/proc`` may show the path of the group on the host, while the files of the group are at the top of
    the hierarchy. So the quotas of all folders above the path are read, too.
    """
    groups = system / "proc/self/cgroup"
    for line in groups.read_text(encoding="utf-8").splitlines() if groups.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = system / "sys/fs/cgroup" / ("cpu" if controllers else "")
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            quota = _quota(folder, is_first_version=bool(controllers))
            if quota is not None:
                yield quota
            if folder == top:
                break


def _quota(folder: Path, is_first_version: bool) -> tuple[int, int] | None:
    """Quota and period of a control group; None if the group has no quota or is not visible in the container."""
    try:
        if is_first_version:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        else:
            quota, period = (folder / "cpu.max").read_text().split()
    except OSError:
        return None
    return (int(quota), int(period)) if quota != "max" and int(quota) > 0 else None  # version 1 writes -1 for no quota


def num_threads(asked: int, num_ranks: int) -> int:
    """Number of torch threads of a rank on a CPU.

    Args:
        asked: number in the configuration; 0 uses ``OMP_NUM_THREADS`` or, if that is not a number, an equal share of
            the cores.
        num_ranks: number of ranks on this machine.
    """
    if asked:
        return asked
    outermost = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if outermost.isdecimal() and int(outermost):
        return int(outermost)
    return max(1, num_cores() // num_ranks)


def spin_briefly() -> None:
    """Make waiting OpenMP threads sleep after a short spin, unless the user has set how they wait.

    Call this function before torch is imported, because torch's OpenMP runtime reads the setting when it loads. By
    default a thread that has finished its part spins for milliseconds. If another program uses one of the cores,
    spinning takes time from the threads that still compute, and two threads are slower than one. Without any spinning,
    each parallel region waits until threads wake up, which slows training on an idle machine. Measurements of both
    effects are in ``evals/results/busy-cores-cpu.json``.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
