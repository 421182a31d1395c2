"""Registries on file systems without hard links: one winner of every race, or a refusal before anything is written."""

import errno
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tarflow_scale.registry import Registry
from tests.conftest import TOP, command
from tests.linkless import needs_compiler, without_links
from tests.registry.test_registry import FACTS

RACE = (
    "import os, sys; from evals.benchmarks import registry_faults\n"
    "try: os.link('LICENSE', sys.argv[1])\n"
    "except OSError as error: print(error.strerror)\n"
    "print(registry_faults.race(sys.argv[1], 50, 'fork'))\n"
)


@pytest.mark.slow
@needs_compiler
def test_sixteen_processes_race_without_hard_links_and_one_wins_each_of_50_rounds(tmp_path: Path) -> None:
    pytest.importorskip("moto")
    path = tmp_path / "registry"
    result = subprocess.run(
        [sys.executable, "-c", RACE, str(path)],
        cwd=TOP,
        env=os.environ | without_links("EPERM") | {"PYTHONPATH": str(TOP), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout) == (0, "Operation not permitted\n50\n"), result.stderr
    assert len(list((path / "m/_log").iterdir())) == 32 + 50  # events alone: no temporary file is left


@needs_compiler
def test_init_proves_a_file_system_without_hard_links(tmp_path: Path) -> None:
    made = command("models", "init", f"registry.path={tmp_path}/r", environment=without_links("ENOTSUP"))
    assert (made.returncode, made.stderr) == (0, "")
    assert "is a registry (8 writers, 100 names, 100 winners)" in made.stdout


@needs_compiler
@pytest.mark.parametrize("answers", [("EPERM", "EINVAL"), ("ENOSYS", "ENOSYS"), ("EOPNOTSUPP", "EPERM")])
def test_init_refuses_a_file_system_that_has_no_exclusive_create(tmp_path: Path, answers: tuple[str, str]) -> None:
    path, environment = tmp_path / "r", without_links(*answers)
    refused = command("models", "init", f"registry.path={path}", environment=environment)
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert f"{path}/.probe-" in line
    assert (
        "must be on a file system with hard links or RENAME_NOREPLACE, so that only one writer can create a file"
        in line
    )
    assert line.endswith("use another file system, or set command.single_writer=true if only one process writes")
    assert list(path.iterdir()) == []


@needs_compiler
def test_a_first_version_is_refused_there_before_anything_is_written(tmp_path: Path) -> None:
    work = (
        "import sys; from tarflow_scale.errors import RegistryError; from tarflow_scale.registry import Registry\n"
        "from tests.registry.test_registry import FACTS\n"
        "try: print(Registry(sys.argv[1], 'm').register({'w': b'1'}, FACTS, '').version)\n"
        "except RegistryError as error: print(error)\n"
    )
    environment = without_links("EPERM", "EINVAL")

    def register() -> str:
        result = subprocess.run(
            [sys.executable, "-c", work, str(tmp_path / "r")],
            cwd=TOP,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return result.stdout

    assert register().endswith("or set command.single_writer=true if only one process writes\n")
    assert list((tmp_path / "r").iterdir()) == []
    where = f"registry.path={tmp_path}/r"
    made = command("models", "init", where, "command.single_writer=true", environment=environment)
    assert (made.returncode, made.stderr) == (0, "")
    assert register() == "1\n"
    assert Registry(str(tmp_path / "r"), "m").register({"w": b"2"}, FACTS, "").version == 2


@pytest.mark.slow
def test_a_kill_at_any_write_without_hard_links_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("moto")
    from evals.benchmarks import registry_faults

    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refused)
    random.seed(0)
    assert registry_faults.killed_at_every_write(registry_faults.make_world(tmp_path, stride=4), tmp_path) >= 10
