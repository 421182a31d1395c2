"""Threads follow the cores that a job was given, and do not take them from each other by spinning."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tarflow_scale.runtime.cores import num_cores, num_threads, spin_briefly
from tests.conftest import TOP

OPENMP = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def python(script: str, environment: dict[str, str], prepare: Callable[[], None] | None = None) -> str:
    kept = {name: value for name, value in os.environ.items() if name not in OPENMP}
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=TOP, env=kept | environment, preexec_fn=prepare,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1]


@pytest.fixture
def large_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


GROUPS = {
    "none": ("0::/\n", {}, 64),
    "of_the_job": ("0::/job/step\n", {"job/cpu.max": "400000 100000\n", "job/step/cpu.max": "max 100000\n"}, 4),
    "part_of_a_core": ("0::/job\n", {"job/cpu.max": "150000 100000\n"}, 2),
    "in_a_container": ("0::/\n", {"cpu.max": "400000 100000\n"}, 4),
    "version_1": (
        "5:memory:/other\n4:cpuacct,cpu:/job/step\n0::/\n",
        {f"cpu/job/{name}": text for name, text in (
            ("cpu.cfs_quota_us", "400000\n"), ("cpu.cfs_period_us", "100000\n"),
            ("step/cpu.cfs_quota_us", "-1\n"), ("step/cpu.cfs_period_us", "100000\n"),
        )},
        4,
    ),
    "version_1_in_a_container_that_sees_its_path_on_the_host": (
        "4:cpu,cpuacct:/docker/0123\n", {"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.usefixtures("large_machine")
def test_a_job_with_a_quota_of_4_of_64_cores_starts_4_threads(name: str, tmp_path: Path) -> None:
    groups, files, cores = GROUPS[name]
    for path, text in {"proc/self/cgroup": groups, **{f"sys/fs/cgroup/{one}": files[one] for one in files}}.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    assert num_cores(tmp_path) == cores


@pytest.mark.usefixtures("large_machine")
def test_a_setting_wins_over_the_environment_and_that_over_the_share(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = num_cores() // 3
    assert num_threads(0, 3) == shared
    assert num_threads(0, 10_000) == 1
    assert num_threads(7, 3) == 7
    for text, threads in (("5", 5), (" 6,2 ", 6), ("many", shared), ("0", shared), ("", shared)):
        monkeypatch.setenv("OMP_NUM_THREADS", text)
        assert num_threads(0, 3) == threads
        assert num_threads(7, 3) == 7


THREADS_OF_TRAINING = (
    "import torch; from tarflow_scale.training.engine import start_process_group; start_process_group(0)\n"
    "print(torch.get_num_threads(), flush=True); import os; os._exit(0)"
)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_training_follows_affinity_and_omp_num_threads() -> None:
    first = min(os.sched_getaffinity(0))
    assert python(THREADS_OF_TRAINING, {}, lambda: os.sched_setaffinity(0, {first})) == "1"
    assert python(THREADS_OF_TRAINING, {"OMP_NUM_THREADS": "1"}) == "1"
    assert python(THREADS_OF_TRAINING, {}) == str(num_cores())


def test_the_launcher_shares_the_cores_as_the_package_does(tmp_path: Path) -> None:
    """Where a job has 64 cores, whatever the machine of this test has."""
    (tmp_path / "sitecustomize.py").write_text("import os\nos.sched_getaffinity = lambda _: set(range(64))\n")
    kept = {name: value for name, value in os.environ.items() if name not in OPENMP}
    environment = kept | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{tmp_path}:{TOP}",
    }
    script = "ranks=3; . launch/env.sh; echo $OMP_NUM_THREADS"
    for given, threads in (({}, str(python_cores(tmp_path) // 3)), ({"OMP_NUM_THREADS": "2"}, "2")):
        result = subprocess.run(
            ["bash", "-c", script], cwd=TOP, env=environment | given, capture_output=True, text=True, check=True
        )
        assert result.stdout == f"{threads}\n"


def python_cores(folder: Path) -> int:
    """Cores of a process on the machine of 64, which are fewer where the tests themselves have a quota."""
    script = "from tarflow_scale.runtime.cores import num_cores; print(num_cores())"
    return int(python(script, {"PYTHONPATH": f"{folder}:{TOP}"}))


@pytest.mark.parametrize("given", [{"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}])
def test_how_threads_wait_is_set_unless_the_user_has(given: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OPENMP:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    spin_briefly()
    assert dict(os.environ) == before
    for name in given:
        monkeypatch.delenv(name)
    spin_briefly()
    assert 0 < int(os.environ["GOMP_SPINCOUNT"]) < 300_000
    monkeypatch.delenv("GOMP_SPINCOUNT")


def test_the_command_line_sets_how_threads_wait_before_torch_is_imported() -> None:
    script = (
        "import os, sys; from tarflow_scale import __main__, cli\n"
        "cli.main = lambda: print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules) or 0\n"
        "__main__.main()"
    )
    assert python(script, {}) == "1000 False"
    assert python(script, {"GOMP_SPINCOUNT": "9"}) == "9 False"


@pytest.mark.slow
def test_loading_a_flow_in_python_sets_how_threads_wait_where_torch_is_not_there_yet() -> None:
    script = "import os; {}; print(os.environ.get('GOMP_SPINCOUNT'))"
    assert python(script.format("from tarflow_scale import load"), {}) == "1000"
    assert python(script.format("from tarflow_scale import load"), {"GOMP_SPINCOUNT": "9"}) == "9"
    assert python(script.format("import tarflow_scale"), {}) == "None"
    assert python(script.format("import torch; from tarflow_scale import load"), {}) == "None"
