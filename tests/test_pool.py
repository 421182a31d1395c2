"""The pool: both executors give the same results, and losing a worker changes nothing."""

import os
from pathlib import Path
from typing import Any

import pytest

from tarflow_scale.errors import PlanError, UserError
from tarflow_scale.pool import run_units


class Squarer:
    """Squares; dies once if asked to, and fails as a user's mistake would on a negative number."""

    def __init__(self, offset: int, die_once: str = "") -> None:
        if offset < 0:
            raise PlanError(f"offset must not be negative (got {offset}); choose another")
        self._offset = offset
        self._die_once = Path(die_once) if die_once else None

    def run(self, unit: int) -> int:
        if unit < 0:
            raise PlanError(f"units must not be negative (got {unit}); count from 0")
        if unit == 3 and self._die_once and not self._die_once.exists():
            self._die_once.touch()
            os._exit(1)
        return unit * unit + self._offset


def test_in_this_process() -> None:
    found = list(run_units(Squarer, {"offset": 1}, range(4), executor="local"))
    assert found == [(0, 1), (1, 2), (2, 5), (3, 10)]
    assert list(run_units(Squarer, {"offset": 1}, [], executor="local")) == []


@pytest.mark.ray
def test_on_ray_with_a_worker_that_dies(tmp_path: Path) -> None:
    arguments = {"offset": 1, "die_once": str(tmp_path / "died")}
    found = dict(run_units(Squarer, arguments, range(8), executor="ray", num_workers=2))
    assert found == {unit: unit * unit + 1 for unit in range(8)}
    assert (tmp_path / "died").exists()


@pytest.mark.ray
def test_on_ray_a_users_mistake_keeps_its_message() -> None:
    with pytest.raises(PlanError, match=r"^units must not be negative \(got -1\); count from 0$"):
        list(run_units(Squarer, {"offset": 0}, [0, -1], executor="ray", num_workers=1))


@pytest.mark.ray
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arguments": {"offset": -2}}, r"^offset must not be negative \(got -2\); choose another$"),
        (
            {"gpus_per_worker": 999},
            r"^the cluster must have 999 GPUs for 1 workers \(got \d+\); lower cluster.num_workers",
        ),
    ],
)
def test_on_ray_a_worker_that_cannot_be_built_or_placed_is_one_line(options: dict[str, Any], message: str) -> None:
    arguments = options.pop("arguments", {"offset": 0})
    with pytest.raises(UserError, match=message):
        list(run_units(Squarer, arguments, [0], executor="ray", num_workers=1, **options))
