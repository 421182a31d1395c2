"""Speed: what counts as a step and what does not."""

import time

import pytest
import torch

from tarflow_scale.training.meter import Meter, peak_flops_of


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_rates_leave_out_what_is_no_step(clock: list[float]) -> None:
    meter = Meter(flops_per_image=2e9, tokens_per_image=16, peak_flops=1e12, ranks=4, _started=100.0)
    with meter.spending("data"):
        clock[0] += 1.0
    clock[0] += 3.0
    meter.stepped(800)
    with meter.spending("checkpoint"):
        clock[0] += 7.0
    with meter.spending("preview"):
        clock[0] += 2.0
    assert meter.figures() == meter.figures()  # a look changes nothing
    report = meter.report()
    assert report == {
        "images_per_second": 200.0,
        "tokens_per_second": 3200.0,
        "mfu": pytest.approx(200 / 4 * 2e9 / 1e12),
        "data_wait_fraction": 0.25,
        "checkpoint_seconds": 7.0,
        "validation_seconds": 0.0,
        "preview_seconds": 2.0,
    }
    clock[0] += 2.0
    meter.stepped(10)
    assert meter.report()["images_per_second"] == 5.0
    assert meter.report()["checkpoint_seconds"] == 0.0


def test_what_is_not_known_is_not_reported(clock: list[float]) -> None:
    report = Meter(flops_per_image=1.0, tokens_per_image=None, peak_flops=None, ranks=1).report()
    assert report["mfu"] is None
    assert report["tokens_per_second"] is None
    assert peak_flops_of(torch.device("cpu")) is None


def test_gpus_are_known_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, peak in (
        ("NVIDIA H200", 989.5e12),
        ("NVIDIA H100 80GB HBM3", 989.5e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert peak_flops_of(torch.device("cuda")) == peak
