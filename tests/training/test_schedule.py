"""Learning rate and averaging as functions of images seen."""

import pytest

from tarflow_scale.config.train import ScheduleConfig
from tarflow_scale.training.schedule import average_decay, learning_rate_fraction

TOTAL = 1100
COSINE = ScheduleConfig(warmup_images=100, final_lr_fraction=0.1)
CONSTANT = ScheduleConfig(kind="constant", warmup_images=100)
WSD = ScheduleConfig(kind="wsd", warmup_images=100, decay_images=200, final_lr_fraction=0.1)


@pytest.mark.parametrize(
    ("schedule", "images", "expected"),
    [
        *((COSINE, *case) for case in [(0, 0.0), (50, 0.5), (100, 1.0), (600, 0.55), (1100, 0.1), (5000, 0.1)]),
        *((CONSTANT, *case) for case in [(0, 0.0), (50, 0.5), (100, 1.0), (600, 1.0), (1100, 1.0), (5000, 1.0)]),
        *(
            (WSD, *case)
            for case in [(0, 0.0), (50, 0.5), (100, 1.0), (900, 1.0), (1000, 0.55), (1100, 0.1), (5000, 0.1)]
        ),
    ],
)
def test_warm_up_then_the_shape(schedule: ScheduleConfig, images: int, expected: float) -> None:
    assert learning_rate_fraction(images, TOTAL, schedule) == pytest.approx(expected, abs=1e-12)


def test_the_average_halves_its_past_in_a_half_life() -> None:
    steps, batch, half_life = 50, 20, 1000
    kept = 1.0
    for step in range(steps):
        kept *= average_decay(10**9 + step * batch, batch, half_life)
    assert kept == pytest.approx(0.5)


def test_the_average_forgets_the_start_quickly() -> None:
    assert average_decay(64, 64, 10**6) < 1e-5
    assert average_decay(10**4, 64, 10**6) == pytest.approx(0.5 ** (64 / 500))
