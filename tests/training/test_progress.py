"""What the progress line says of a run."""

import pytest

from tarflow_scale.config.train import SpikeConfig
from tarflow_scale.records import PixelFormat
from tarflow_scale.training.progress import Progress, bits_per_dim, progress_line
from tarflow_scale.training.spikes import LossHistory

UNIFORM = PixelFormat(bit_depth=4, noise="uniform")
SPEED: dict[str, float | None] = {"mfu": None, "data_wait_fraction": 0.125}


def test_the_line_has_loss_rate_gradient_waiting_and_memory_from_the_first_step_on() -> None:
    progress = Progress(LossHistory(SpikeConfig()))
    progress.take(-1.0)
    full, brief = progress_line(progress, UNIFORM, 1.25e-3, 0.4567, SPEED, 3 * 2**29)
    assert brief == f"{bits_per_dim(-1.0, UNIFORM):.3f} bits/dim"
    assert full == f"{brief}, learning rate 0.0013, gradient norm 0.457, waiting for data 12%, 1.50 GiB per rank"


def test_what_is_not_usual_is_said() -> None:
    progress = Progress(LossHistory(SpikeConfig()), skipped_steps=2, held_out=-0.5)
    progress.take(-1.0)
    noisy = PixelFormat(bit_depth=8, noise="gaussian", noise_std=0.1)
    full, brief = progress_line(progress, noisy, 1e-3, float("inf"), SPEED | {"mfu": 0.41}, 2**30)
    assert brief == "-1.000 nats/dim, held out -0.500 nats/dim (averaged weights)"
    assert ", MFU 41%, " in full
    assert "gradient not finite" in full
    assert full.endswith("2 steps skipped")


def test_the_loss_is_the_mean_of_the_last_steps_whatever_was_logged() -> None:
    progress = Progress(LossHistory(SpikeConfig()))
    for step in range(100):
        progress.take(float(step))
    progress.loss_sum, progress.loss_steps = 0.0, 0  # as after a record of the log
    _, brief = progress_line(progress, PixelFormat(bit_depth=8, noise="none"), 1e-3, 1.0, SPEED, 0)
    assert brief == "89.500 nats/dim"


def test_only_uniform_noise_has_bits() -> None:
    assert bits_per_dim(0.0, UNIFORM) == pytest.approx(3.0)
    assert bits_per_dim(0.0, PixelFormat(bit_depth=8, noise="none")) is None
    assert bits_per_dim(None, UNIFORM) is None
