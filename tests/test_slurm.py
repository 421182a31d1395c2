"""The scripts in `launch/slurm` on a real Slurm of two nodes; `evals/benchmarks/slurm_faults.py` has all scenarios."""

from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from evals.benchmarks import slurm_cluster as cluster
from evals.benchmarks import slurm_faults as faults

pytestmark = [
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.skipif(bool(cluster.missing()), reason=cluster.missing()),
]

SCENARIOS = [faults.a_more_urgent_job, faults.a_mistake]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Generator[object]:
    with cluster.slurm(tmp_path_factory.mktemp("slurm")) as own:
        yield faults.make_world(own, tmp_path_factory.mktemp("world"), num_images=3000)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda one: one.__name__)
def test_a_job_survives(scenario: Callable[[object, Path], None], world: object, tmp_path: Path) -> None:
    scenario(world, tmp_path)  # raises `Failed` unless the job ends like one that nothing disturbed
    assert (tmp_path / "run.out").exists()
