"""Verb ``doctor``: can this machine, and its cluster, do the work? One line a check; the exit code tells.

``ok`` and ``skipped`` need nothing; a ``warning`` is what would slow the work, ``failed`` what would stop it, and each
says what to do. Exit code 0: nothing failed; 1: something did; 2: the configuration is wrong.

Every check runs in a child process with a deadline, so that a file system, driver or server that hangs is a finding,
and one that crashes is too. Nothing is left behind: what a check wrote it removes, what it started it ends, and on a
Ray cluster nothing is started.

Under a launcher (RANK and WORLD_SIZE are set) the ranks meet as they would for training, and the one that does not
answer is named. Then the first rank of each machine looks at its machine, and rank 0 at the cluster too. Machines other
than rank 0's print what is not well alone.
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
from tarflow_scale.config.doctor import CHECKS, DoctorConfig
from tarflow_scale.errors import Unfit, UserError
from tarflow_scale.pool import temporary_folder
from tarflow_scale.runtime import distributed
from tarflow_scale.runtime.processes import answer_within
from tarflow_scale.verbs.doctor import installed, launch, machine, places, ranks, ray_cluster
from tarflow_scale.verbs.doctor.finding import Finding, failed, from_message, skipped

__all__ = ["run"]


@dataclass(frozen=True)
class _Check:
    """A question to this machine."""

    name: str
    answer: Callable[[], list[Finding]]
    """Runs in a child process."""
    timeout_seconds: float
    after: str = ""
    """The check without which this one says nothing new."""
    undo: Callable[[], None] | None = None
    """Removes what the check leaves where it is ended early."""


def run(config: DoctorConfig, dry_run: bool) -> None:
    """Make the checks and print what each found.

    Raises:
        Unfit: a check failed.
    """
    checks = _checks(config)
    if dry_run:
        print("checks to make: " + ", ".join(check.name for check in checks))
        return
    findings: list[Finding] = []
    for finding in _findings(checks):
        findings.append(finding)
        if distributed.is_main():
            print(finding.line, flush=True)
        elif _speaks(finding):
            print(f"{finding.line} (on {socket.gethostname()}, rank {distributed.rank()})", flush=True)
    if config.output is not None and distributed.is_main():
        content = json.dumps([asdict(finding) for finding in findings], indent=1)
        storage.write_bytes(config.output.path, f"{content}\n".encode())
    stopping = list(dict.fromkeys(finding.name for finding in findings if finding.status == "failed"))
    # Of a machine's ranks its first one speaks, since a launcher ends the others as soon as one has failed.
    if stopping and distributed.local_rank() == 0:
        raise Unfit(
            f"this machine must be fit for the work (got failed checks: {', '.join(stopping)}); do what their lines say"
        )


def _speaks(finding: Finding) -> bool:
    """Whether a rank other than 0 prints it: a machine what is not well, another rank that it met nobody."""
    if distributed.local_rank() == 0:
        return finding.status in ("warning", "failed")
    return finding.status == "failed" and finding.name == "ranks"


def _checks(config: DoctorConfig) -> list[_Check]:
    """What is to be asked of this rank, in the order of `tarflow_scale.config.doctor.CHECKS`."""
    seconds = config.checks.timeout_seconds
    patience = seconds + 2 * config.ranks.timeout_seconds

    def check(name: str, answer: Callable[..., list[Finding]], *arguments: object) -> _Check:
        return _Check(name, partial(answer, *arguments), seconds)

    found = [check("launch", launch.environment)]
    found.append(_Check("ranks", partial(ranks.collectives, config.ranks), patience, after="launch"))
    if distributed.local_rank() == 0:
        found += [
            check("packages", installed.packages),
            check("torch", installed.torch_and_devices, config.parallelism, config.cluster),
            check("compiler", installed.compiler),
            check("threads", machine.threads, config.training.threads if config.training else 0),
            check("memory", machine.shared_memory),
            check("limits", machine.limits),
            check("home", machine.home),
            check("temporary", machine.temporary, temporary_folder()),
            check("disk", places.disk, config),
            *(check("data", places.data_set, *item) for item in config.data_sets.items()),
            *(_store_check(key, path, seconds, config) for key, path in config.written.items()),
            *_registry_read(config, seconds),
            check("weights", places.weights, config.metrics),
        ]
        found += [
            check(name, _nothing_named, name, key)
            for name, key, there in (
                ("data", "data.path", config.data_sets),
                ("store", "store.path", config.written or config.registry),
            )
            if not there
        ]
    if distributed.is_main():
        found.append(check("cluster", ray_cluster.reach, config.cluster))
    asked = [check for check in found if check.name in config.checks.only]
    return sorted(asked, key=lambda check: [*CHECKS].index(check.name))


def _store_check(key: str, path: str, seconds: float, config: DoctorConfig) -> _Check:
    folder = places.trial_folder(path)
    answer = partial(places.store, key, path, folder)
    if key == "registry.path" and config.writes_registry is None:
        answer = partial(places.writable_registry, path, answer)
    return _Check("store", answer, seconds, undo=partial(storage.remove_tree, folder))


def _registry_read(config: DoctorConfig, seconds: float) -> list[_Check]:
    if config.registry is None or config.writes_registry is not False:
        return []
    return [_Check("store", partial(places.registry, config.registry.path), seconds)]


def _nothing_named(name: str, key: str) -> list[Finding]:
    return [skipped(name, f"{key} names none")]


def _findings(checks: list[_Check]) -> Iterator[Finding]:
    """The answers, as they come."""
    stopped: set[str] = set()
    for check in checks:
        if check.after in stopped:
            yield skipped(check.name, f"until {check.after} is well")
            continue
        for finding in _answers(check):
            if finding.status == "failed":
                stopped.add(check.name)
            yield finding


def _answers(check: _Check) -> list[Finding]:
    try:
        with tempfile.TemporaryDirectory(prefix="tarflow-scale-") as folder:  # ours, and so gone if the child is killed
            return answer_within(check.timeout_seconds, partial(_caught, check, folder))
    except TimeoutError:
        _undo(check)
        advice = "find out what hangs (a file system, a driver, a server), or raise checks.timeout_seconds"
        return [failed(check.name, f"no answer within {check.timeout_seconds:g} s", advice)]
    except ChildProcessError as error:
        _undo(check)
        return [
            failed(check.name, f"the check crashed, {error}", "repair what it names, usually by installing it again")
        ]
    except OSError as error:  # of this process
        advice = "set TMPDIR to a folder that can be written and has room"
        return [failed(check.name, f"cannot write temporary files ({error.strerror})", advice)]


def _undo(check: _Check) -> None:
    if check.undo is not None:
        with suppress(TimeoutError, ChildProcessError):  # as slow, or as broken, as the check was
            answer_within(check.timeout_seconds, partial(_tried, check.undo))


def _tried(remove: Callable[[], None]) -> None:
    with suppress(UserError, OSError):
        remove()


def _caught(check: _Check, folder: str) -> list[Finding]:
    """The answer, where a broken machine is no bug of ours; libraries leave their temporary files in ``folder``."""
    os.environ["TMPDIR"] = tempfile.tempdir = folder
    try:
        return check.answer()
    except UserError as error:
        return [from_message(check.name, str(error))]
    except Exception as error:
        words = f"{type(error).__name__}: {error}"
        return [failed(check.name, words, "repair what it names; if nothing is broken, report it as a bug")]
