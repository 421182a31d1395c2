"""Faults of a run, once each; `evals/benchmarks/faults.py --repeat N` reaches larger counts.

Two of them are proved by `tests/verbs/test_train.py`: kill -9 of the launcher and all ranks, and a damaged checkpoint.
"""

import os
import random
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from evals.benchmarks import fault_running, faults
from tests import forking

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

needs_mount = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small file system")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Generator[object]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fault_running, "launch", forking.start)
        yield faults.make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize(
    "scenario",
    [
        pytest.param(one, marks=needs_mount if one is faults.full_disk_during_a_save else ())
        for one in faults.SCENARIOS
        if one not in (faults.kill_all_ranks, faults.damaged_checkpoint)
    ],
    ids=lambda one: one.__name__,
)
def test_a_run_survives(scenario: Callable[[object, Path], None], world: object, tmp_path: Path) -> None:
    random.seed(0)
    scenario(world, tmp_path)  # raises `Failed` unless the run ends like one that nothing disturbed
    assert (tmp_path / "run/status.json").exists() or (tmp_path / "disk").exists()
