"""Learning rate and averaging as functions of images seen."""

import pytest

from tarflow_scale.config import OptimizerConfig, ScheduleConfig
from tarflow_scale.training.schedule import average_decay, learning_rate

OPTIMIZER = OptimizerConfig(peak_lr=2.0)
SCHEDULE = ScheduleConfig(warmup_images=100, final_lr_fraction=0.1)


@pytest.mark.parametrize(
    ("images", "expected"),
    [(0, 0.0), (50, 1.0), (100, 2.0), (600, 0.2 + 1.8 * 0.5), (1100, 0.2), (5000, 0.2)],
)
def test_warm_up_then_cosine(images: int, expected: float) -> None:
    assert learning_rate(images, 1100, OPTIMIZER, SCHEDULE) == pytest.approx(expected, abs=1e-12)


def test_the_average_halves_its_past_in_a_half_life() -> None:
    steps, batch, half_life = 50, 20, 1000
    kept = 1.0
    for step in range(steps):
        kept *= average_decay(10**9 + step * batch, batch, half_life)
    assert kept == pytest.approx(0.5)


def test_the_average_forgets_the_start_quickly() -> None:
    assert average_decay(64, 64, 10**6) < 1e-5
    assert average_decay(10**4, 64, 10**6) == pytest.approx(0.5 ** (64 / 500))
