"""Every fault once; `evals/benchmarks/evaluation_faults.py --repeat N` reaches larger counts."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from evals.benchmarks import evaluation_faults as faults

pytestmark = [pytest.mark.slow, pytest.mark.ray]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> object:
    return faults.make_world(tmp_path_factory.mktemp("world"), kills=3)


@pytest.mark.parametrize("scenario", faults.SCENARIOS, ids=lambda one: one.__name__)
def test_an_evaluation_survives(scenario: Callable[[object, Path], None], world: object, tmp_path: Path) -> None:
    random.seed(0)
    scenario(world, tmp_path)  # raises `Failed` unless the numbers are those of an undisturbed evaluation
    assert list(tmp_path.rglob("registry"))
