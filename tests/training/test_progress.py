"""What the progress line says of a run."""

import math

import pytest

from tarflow_scale.config.model import NICEConfig
from tarflow_scale.config.train import SpikeConfig
from tarflow_scale.flows import build
from tarflow_scale.records import PixelFormat
from tarflow_scale.training.objective import FlowObjective
from tarflow_scale.training.progress import Progress, progress_line
from tarflow_scale.training.spikes import LossHistory


def objective(**pixels: object) -> FlowObjective:
    flow = build(NICEConfig(width=2, class_conditional=False), (1, 2, 2))
    flow.pixels = PixelFormat.model_validate(pixels)
    return FlowObjective(flow, conditional=False, label_drop=0.0)


UNIFORM = objective(bit_depth=4, noise="uniform")
SPEED: dict[str, float | None] = {"mfu": None, "data_wait_fraction": 0.125}


def test_the_line_has_loss_rate_gradient_waiting_and_memory_from_the_first_step_on() -> None:
    progress = Progress(LossHistory(SpikeConfig()))
    progress.take((-1.0,))
    full, brief = progress_line(progress, UNIFORM.text, 1.25e-3, 0.4567, SPEED, 3 * 2**29)
    assert brief == f"{-1 / math.log(2) + 3:.3f} bits/dim"
    assert full == f"{brief}, learning rate 0.0013, gradient norm 0.457, waiting for data 12%, 1.50 GiB per rank"


def test_what_is_not_usual_is_said() -> None:
    progress = Progress(LossHistory(SpikeConfig()), skipped_steps=2, held_out=(-0.5,))
    progress.take((-1.0,))
    noisy = objective(bit_depth=8, noise="gaussian", noise_std=0.1).text
    full, brief = progress_line(progress, noisy, 1e-3, float("inf"), SPEED | {"mfu": 0.41}, 2**30)
    assert brief == "-1.000 nats/dim, held out -0.500 nats/dim (averaged weights)"
    assert ", MFU 41%, " in full
    assert "gradient not finite" in full
    assert full.endswith("2 steps skipped")


def test_the_loss_is_the_mean_of_the_last_steps_whatever_was_logged() -> None:
    progress = Progress(LossHistory(SpikeConfig()))
    for step in range(100):
        progress.take((float(step),))
    assert progress.means() == (49.5,)  # as for a record of the log
    assert progress.means() is None
    _, brief = progress_line(progress, objective(bit_depth=8, noise="none").text, 1e-3, 1.0, SPEED, 0)
    assert brief == "89.500 nats/dim"


def test_only_uniform_noise_has_bits() -> None:
    assert UNIFORM.record((0.0,)) == {"nats_per_dim": 0.0, "bits_per_dim": pytest.approx(3.0)}
    assert objective(bit_depth=8, noise="none").record((0.0,)) == {"nats_per_dim": 0.0, "bits_per_dim": None}
    assert UNIFORM.record(None) == {"nats_per_dim": None, "bits_per_dim": None}
