"""Verb ``doctor``: check whether this machine and its cluster can do the work. Prints one line for each check.

``ok`` and ``skipped`` need no action. ``warning`` means that jobs would be slow or might fail later. ``failed`` means
that jobs would stop. Both give advice. Exit code 0: no check failed; 1: a check failed; 2: the configuration is wrong.

Every check runs in a child process with a time limit, so a file system, driver or server that hangs or crashes is
reported as a failed check. A check removes the files that it wrote and ends the processes that it started. No
check starts work on a Ray cluster.

Under a launcher (RANK and WORLD_SIZE are set) the ranks connect as they would for training, and the check names ranks
that do not answer. Then the first rank of each machine checks its machine, and rank 0 also checks the cluster. Rank 0
prints all lines; other machines print only warnings and failures.
"""

import json
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial

from tarflow_scale import storage
from tarflow_scale.config.cluster import ClusterConfig
from tarflow_scale.config.doctor import CHECKS, DoctorConfig
from tarflow_scale.config.parallelism import ParallelismConfig
from tarflow_scale.errors import Unfit, UserError
from tarflow_scale.pool import temporary_folder
from tarflow_scale.runtime import distributed
from tarflow_scale.runtime.processes import answer_within
from tarflow_scale.verbs.doctor import installed, launch, machine, places, ranks, ray_cluster
from tarflow_scale.verbs.doctor.finding import Finding, failed, from_message, skipped

__all__ = ["run"]


@dataclass(frozen=True)
class _Check:
    """A check, and how to run it."""

    name: str
    answer: Callable[[], list[Finding]]
    """Runs the check; it is called in a child process."""
    timeout_seconds: float
    after: str = ""
    """Name of a check that must pass first."""
    undo: Callable[[], None] | None = None
    """Removes the files of a check that was killed."""


def run(config: DoctorConfig, dry_run: bool) -> None:
    """Run the checks and print their findings.

    Raises:
        Unfit: a check failed.
    """
    seconds = config.checks.timeout_seconds
    patience = seconds + 2 * config.ranks.timeout_seconds
    checks = [
        _Check("launch", launch.environment, seconds),
        _Check("ranks", partial(ranks.collectives, config.ranks), patience, after="launch"),
    ]
    if distributed.local_rank() == 0:
        threads = config.training.threads if config.training else 0
        disk = partial(places.disk, config.logging, config.data, config.model, config.training, config.checkpoint)
        registry = config.registry.path if config.registry else None
        checks += [
            *_of_machine(config.parallelism, config.cluster, threads, seconds),
            _Check("disk", disk, seconds),
            *_of_data_sets(config.data_sets, seconds),
            *_of_stores(config.written, registry, config.writes_registry, seconds),
            _Check("weights", partial(places.weights, config.metrics), seconds),
        ]
    if distributed.is_main():
        checks.append(_Check("cluster", partial(ray_cluster.reach, config.cluster), seconds))
    checks = sorted(
        (check for check in checks if check.name in config.checks.only), key=lambda check: [*CHECKS].index(check.name)
    )
    if dry_run:
        print("checks to make: " + ", ".join(check.name for check in checks))
        return
    findings: list[Finding] = []
    for finding in _findings(checks):
        findings.append(finding)
        if distributed.is_main():
            print(finding.line, flush=True)
        elif _is_reported(finding):
            print(f"{finding.line} (on {socket.gethostname()}, rank {distributed.rank()})", flush=True)
    if config.output is not None and distributed.is_main():
        content = json.dumps([asdict(finding) for finding in findings], indent=1)
        storage.write_bytes(config.output.path, f"{content}\n".encode())
    failures = list(dict.fromkeys(finding.name for finding in findings if finding.status == "failed"))
    # Only the first rank of a machine raises the error, because a launcher ends all ranks when one has failed.
    if failures and distributed.local_rank() == 0:
        raise Unfit(
            f"all checks must pass (got failed checks: {', '.join(failures)}); follow the advice in their lines"
        )


def _is_reported(finding: Finding) -> bool:
    """Whether a rank other than 0 prints a finding.

    The first rank of a machine prints warnings and failures. The other ranks print only a failure of the check
    ``ranks``, which means that they could not connect to other ranks.
    """
    if distributed.local_rank() == 0:
        return finding.status in ("warning", "failed")
    return finding.status == "failed" and finding.name == "ranks"


def _of_machine(
    parallelism: ParallelismConfig, cluster: ClusterConfig | None, threads: int, seconds: float
) -> list[_Check]:
    answers = {
        "packages": installed.packages,
        "torch": partial(installed.torch_and_devices, parallelism, cluster),
        "compiler": installed.compiler,
        "threads": partial(machine.threads, threads),
        "memory": machine.shared_memory,
        "limits": machine.limits,
        "home": machine.home,
        "temporary": partial(machine.temporary, temporary_folder()),
    }
    return [_Check(name, answer, seconds) for name, answer in answers.items()]


def _of_data_sets(data_sets: dict[str, str], seconds: float) -> list[_Check]:
    if not data_sets:
        return [_Check("data", lambda: [skipped("data", "data.path is not set")], seconds)]
    return [_Check("data", partial(places.data_set, key, path), seconds) for key, path in data_sets.items()]


def _of_stores(
    written: dict[str, str], registry: str | None, writes_registry: bool | None, seconds: float
) -> list[_Check]:
    """Make one check for each folder or URL that a job writes to, and one for a registry that the job only reads.

    Args:
        written: paths that the job writes to, by key of the configuration.
        registry: path of the registry, if the configuration has one.
        writes_registry: whether the job writes to the registry; None if the configuration describes no job.
        seconds: time limit of each check.
    """
    checks: list[_Check] = []
    for key, path in written.items():
        folder = places.trial_folder(path)
        answer = partial(places.store, key, path, folder)
        if key == "registry.path" and writes_registry is None:
            answer = partial(places.writable_registry, path, answer)
        checks.append(_Check("store", answer, seconds, undo=partial(storage.remove_tree, folder)))
    if registry is not None and writes_registry is False:
        checks.append(_Check("store", partial(places.registry, registry), seconds))
    return checks or [_Check("store", lambda: [skipped("store", "store.path is not set")], seconds)]


def _findings(checks: list[_Check]) -> Iterator[Finding]:
    """Run the checks in order, and yield their findings."""
    failed_checks: set[str] = set()
    for check in checks:
        if check.after in failed_checks:
            yield skipped(check.name, f"until {check.after} passes")
            continue
        for finding in _answers(check):
            if finding.status == "failed":
                failed_checks.add(check.name)
            yield finding


def _answers(check: _Check) -> list[Finding]:
    try:
        # This process removes the folder, so it is removed even if the child is killed.
        with tempfile.TemporaryDirectory(prefix="tarflow-scale-") as folder:
            return answer_within(check.timeout_seconds, partial(_caught, check, folder))
    except TimeoutError:
        _undo(check)
        advice = "find out what hangs (a file system, a driver, a server), or raise checks.timeout_seconds"
        return [failed(check.name, f"no answer within {check.timeout_seconds:g} s", advice)]
    except ChildProcessError as error:
        _undo(check)
        advice = "reinstall the software that the message names"
        return [failed(check.name, f"the check crashed ({error})", advice)]
    except OSError as error:  # an error of this process
        advice = "set TMPDIR to a writable folder with free space"
        return [failed(check.name, f"cannot write temporary files ({error.strerror})", advice)]


def _undo(check: _Check) -> None:
    if check.undo is not None:
        with suppress(TimeoutError, ChildProcessError):  # the fault of the check may also prevent the removal
            answer_within(check.timeout_seconds, partial(_tried, check.undo))


def _tried(remove: Callable[[], None]) -> None:
    with suppress(UserError, OSError):
        remove()


def _caught(check: _Check, folder: str) -> list[Finding]:
    """Run a check, and return any exception as a failure. Temporary files of libraries go to ``folder``."""
    os.environ["TMPDIR"] = tempfile.tempdir = folder
    try:
        return check.answer()
    except UserError as error:
        return [from_message(check.name, str(error))]
    except Exception as error:
        words = f"{type(error).__name__}: {error}"
        return [failed(check.name, words, "correct the cause that the message names; if you find none, report a bug")]
