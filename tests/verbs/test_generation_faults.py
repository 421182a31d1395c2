"""Every fault of a generation once, smaller; `evals/benchmarks/generation_faults.py` has larger counts."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from evals.benchmarks import generation_faults as faults

pytestmark = [pytest.mark.slow, pytest.mark.ray]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> object:
    return faults.make_world(tmp_path_factory.mktemp("world"), num_images=3000, kills=4, stride=9)


@pytest.mark.parametrize("scenario", faults.SCENARIOS, ids=lambda one: one.__name__)
def test_a_generation_survives(scenario: Callable[[object, Path], object], world: object, tmp_path: Path) -> None:
    random.seed(1)
    cases = scenario(world, tmp_path)  # raises `Failed` unless every file is that of an undisturbed generation
    assert cases is None or cases >= 4  # it was really disturbed
