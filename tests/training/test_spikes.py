"""Jumps of the loss."""

import math

from tarflow_scale.config.train import SpikeConfig
from tarflow_scale.training.spikes import LossHistory

RULE = SpikeConfig(rule="skip", above_nats_per_dim=0.5, window_steps=4)


def test_a_jump_is_told_by_the_mean_of_a_full_window() -> None:
    history = LossHistory(RULE)
    for loss in (1.0, 2.0, 3.0):
        assert not history.is_spike(100.0)
        history.add(loss)
    history.add(4.0)
    assert not history.is_spike(3.0)
    assert history.is_spike(3.01)
    assert not history.is_spike(math.nan)  # what is not finite is skipped by another rule
    history.add(2.0)
    assert history.losses == (2.0, 3.0, 4.0, 2.0)


def test_it_goes_on_from_what_a_checkpoint_holds() -> None:
    history = LossHistory(RULE, (1.0, 1.0, 1.0, 1.0))
    assert history.is_spike(1.6)
    assert not LossHistory(SpikeConfig(), (1.0, 1.0, 1.0, 1.0)).is_spike(100.0)


def test_without_a_rule_nothing_is_remembered() -> None:
    history = LossHistory(SpikeConfig())
    history.add(1.0)
    assert history.losses == ()
