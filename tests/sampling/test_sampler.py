"""Sampling: image i depends on (weights, seed, i), not on batch size, order or other images."""

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from tarflow_scale.config.generate import GenerateConfig
from tarflow_scale.config.model import GlowConfig
from tarflow_scale.config.sampling import Guidance, SamplingConfig
from tarflow_scale.errors import ConfigError, NumericsError, PlanError
from tarflow_scale.flows import Flow, build
from tarflow_scale.flows.latents import latents
from tarflow_scale.randomness import Purpose, generator
from tarflow_scale.records import PixelFormat
from tarflow_scale.sampling import Sampler, balanced_labels, calibrate
from tarflow_scale.sampling.calibration import candidates, measure_blocks
from tarflow_scale.sampling.decode import Schedule, TarFlowDecoder
from tarflow_scale.sampling.labels import labels_of, numbered
from tests.conftest import TOP


def test_a_latent_depends_on_seed_and_index_alone() -> None:
    whole = latents(5, range(10), 7)
    assert torch.equal(latents(5, range(4, 6), 7), whole[4:6])
    assert not torch.equal(latents(6, range(10), 7), whole)
    expected = generator(Purpose.LATENT, 5, 3).standard_normal(7, np.float32)
    assert np.array_equal(whole[3].numpy(), expected)


def test_latents_are_standard_normal() -> None:
    z = latents(0, range(2000), 50).double()
    assert abs(float(z.mean())) < 5 / np.sqrt(z.numel())
    assert abs(float(z.var()) - 1) < 5 * np.sqrt(2 / z.numel())
    neighbours = (z[:-1] * z[1:]).mean()
    assert abs(float(neighbours)) < 5 / np.sqrt(z.numel())


def sampler(flow: Flow, batch_size: int, guidance: float = 0.0) -> Sampler:
    return Sampler(flow, 1, SamplingConfig(batch_size=batch_size, guidance=Guidance(scale=guidance)))


@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_images_do_not_depend_on_the_batch(flow: Flow, guidance: float) -> None:
    whole = torch.cat(list(sampler(flow, 20, guidance).floats(range(20))))
    for batch_size in (1, 7):
        parts = torch.cat(list(sampler(flow, batch_size, guidance).floats(range(20))))
        assert (parts - whole).abs().max() < 1e-5
    alone = torch.cat(list(sampler(flow, 4, guidance).floats(range(13, 17))))
    assert (alone - whole[13:17]).abs().max() < 1e-5


def test_every_attempt_has_latents_of_its_own() -> None:
    whole = latents(5, range(4), 7)
    again = latents(5, [2, 0], 7, attempt=1)
    assert torch.equal(again[1], latents(5, [0], 7, attempt=1)[0])
    assert not torch.equal(again[0], whole[2])


def test_labels_may_be_named() -> None:
    names = ("smooth", "textured", "7")
    assert numbered("balanced", names) == "balanced"
    assert numbered(("textured", 0, "7"), names) == (1, 0, 2)
    assert numbered({"smooth": 3.0, 1: 1.0}, names) == {0: 3.0, 1: 1.0}
    with pytest.raises(
        ConfigError, match=r"must be class names or numbers \(got rough\); the names are smooth, textured, 7$"
    ):
        numbered(("rough",), names)
    config = GenerateConfig.load(TOP / "configs/generate/digits.yaml", ["sampling.labels={textured: 1, 2: 0.5}"])
    assert config.sampling.labels == {"textured": 1.0, 2: 0.5}


def test_labels_follow_a_rule() -> None:
    assert labels_of((4, 0, 2), range(2, 7), 5, 0).tolist() == [2, 4, 0, 2, 4]
    weights = {1: 1.0, 3: 3.0, 0: 0.0}
    drawn = labels_of(weights, range(4000), 5, 7)
    assert torch.equal(drawn[1000:1003], labels_of(weights, [1000, 1001, 1002], 5, 7))  # of the index alone
    assert not torch.equal(drawn, labels_of(weights, range(4000), 5, 8))
    counts = torch.bincount(drawn, minlength=5)
    assert counts[[0, 2, 4]].tolist() == [0, 0, 0]
    assert abs(int(counts[3]) - 3000) < 5 * (4000 * 0.75 * 0.25) ** 0.5


@pytest.mark.parametrize("rule", [(3,), (-1, 0), (), {3: 1.0}, {0: -1.0, 1: 2.0}, {0: 0.0}, {0: float("inf")}])
def test_labels_that_the_flow_does_not_have(flow: Flow, rule: Any) -> None:
    with pytest.raises(ConfigError, match=r"sampling.labels must"):
        Sampler(flow, 1, SamplingConfig(), labels=rule)


def test_labels_for_a_flow_without_classes() -> None:
    glow = build(GlowConfig(levels=1, steps_per_level=1, width=8, class_conditional=False), (1, 4, 4), None)
    with pytest.raises(ConfigError, match="sampling.labels needs a flow with classes"):
        Sampler(glow, 1, SamplingConfig(), labels=(0,))


def test_labels_run_through_the_classes() -> None:
    assert balanced_labels(range(4, 9), 3).tolist() == [1, 2, 0, 1, 2]


def test_images_are_stored_pixels(flow: Flow) -> None:
    images = sampler(flow, 8).images(range(10))
    assert images.shape == (10, 1, 4, 4)
    assert images.dtype == torch.uint8
    assert (images % 17 == 0).all()


def test_a_flow_that_overflows_is_not_an_image(flow: Flow) -> None:
    with torch.no_grad():
        flow.blocks[0].proj_out.bias.fill_(float("nan"))  # type: ignore[union-attr,operator]
    with pytest.raises(NumericsError, match=r"not finite \(images 0 to 1\)"):
        sampler(flow, 8).images(range(2))


# --- decoders, plans, memory


def settings(**changes: object) -> SamplingConfig:
    return SamplingConfig.model_validate({"batch_size": 6, "decoder": {"kind": "adaptive"}, **changes})


def test_a_plan_names_the_fastest_way_of_each_block_and_its_error(flow: Flow) -> None:
    plan = calibrate(flow, 1, settings())
    assert len(plan.blocks) == len(plan.iterations) == 2
    assert plan.max_error <= 10 * plan.tolerance
    assert plan.pixels_within_one_level > 0.999
    exact = torch.cat(list(Sampler(flow, 1, SamplingConfig(batch_size=6)).floats(range(12))))
    drawn = Sampler(flow, 1, settings(), plan)
    found = torch.cat(list(drawn.floats(range(12))))
    assert (found - exact).abs().max() <= 10 * plan.tolerance
    assert [cost.chunk for cost in drawn.costs] == [block.chunk for block in plan.blocks]


def test_a_plan_of_other_weights_or_settings_is_refused(flow: Flow) -> None:
    plan = calibrate(flow, 1, settings())
    with pytest.raises(ConfigError, match=r"needs a calibration of this version \(got none\)"):
        Sampler(flow, 1, settings())
    with pytest.raises(PlanError, match="different guidance, precision or tolerance"):
        Sampler(flow, 1, settings(decoder={"kind": "adaptive", "tolerance": 0.1}), plan)
    with torch.no_grad():
        next(flow.parameters()).add_(1e-3)
    with pytest.raises(PlanError, match="measured on other weights"):
        Sampler(flow, 1, settings(), plan)


def test_every_way_that_a_plan_may_choose_is_tried_and_wrong_ones_are_dropped(
    flow: Flow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk size that is fast but inexact is not chosen; one that is fast and exact is."""
    assert candidates(1) == []
    assert candidates(15) == [15]
    assert candidates(1023) == [1023, 511, 255, 127, 63, 31, 15]
    decoder = TarFlowDecoder(flow)  # type: ignore[arg-type]
    z = latents(0, range(4), flow.num_dims)
    clock = iter(range(10**6))
    slow = {"chunk": 0}

    def seconds() -> float:  # token by token takes 100 units a run, chunks 1
        return next(clock) * (100.0 if slow["chunk"] == 1 else 1.0)

    run = decoder.decode_block

    def watched(number: int, tokens: torch.Tensor, y: object, guidance: object, schedule: Schedule) -> object:
        slow["chunk"] = schedule.chunk
        x, report = run(number, tokens, None, None, schedule)
        return (x + (1.0 if number == 1 and schedule.chunk > 1 else 0.0), report)

    monkeypatch.setattr(decoder, "decode_block", watched)
    monkeypatch.setattr("tarflow_scale.sampling.calibration.time.perf_counter", seconds)
    monkeypatch.setattr("tarflow_scale.sampling.calibration._SMALLEST", 1)
    first, second = measure_blocks(decoder, z, None, None, 1e-3)
    assert first.chunk > 1
    assert (second.chunk, second.planned) == (1, 1)


def test_the_batch_follows_from_the_memory(flow: Flow, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = TarFlowDecoder(flow).bytes_per_row()  # type: ignore[arg-type]
    monkeypatch.setattr("tarflow_scale.sampling.batch_size.free_bytes", lambda device: 100 * rows)
    assert Sampler(flow, 0, SamplingConfig(batch_size=None)).batch_size == 90
    assert Sampler(flow, 0, SamplingConfig(batch_size=None, guidance=Guidance(scale=1))).batch_size == 45
    assert Sampler(flow, 0, SamplingConfig(batch_size=7)).batch_size == 7
    with pytest.raises(ConfigError, match=r"does not fit in memory \(got 128, .*\); use 90, or null for the maximum"):
        Sampler(flow, 0, SamplingConfig())
    monkeypatch.setattr("tarflow_scale.sampling.batch_size.free_bytes", lambda device: rows)
    with pytest.raises(ConfigError, match=r"does not fit .*; use another device"):
        Sampler(flow, 0, SamplingConfig(batch_size=None))


def test_settings_that_are_for_tarflow_alone() -> None:
    glow = build(GlowConfig(kind="glow", levels=1, steps_per_level=1, width=4), (1, 4, 4), 3)
    for change in ({"decoder": {"precision": "bf16"}}, {"decoder": {"kind": "adaptive"}}):
        with pytest.raises(ConfigError, match="is for TarFlow"):
            Sampler(glow, 0, SamplingConfig.model_validate(change))
    with pytest.raises(ConfigError, match="blocks=first is for TarFlow"):
        Sampler(glow, 0, SamplingConfig(guidance=Guidance(scale=1, blocks="first")))
    with pytest.raises(ConfigError, match="only a TarFlow can be calibrated"):
        calibrate(glow, 0, SamplingConfig())


def test_tolerance_and_decoder_are_checked() -> None:
    for decoder in ({"tolerance": 0}, {"tolerance": -1}, {"kind": "jacobi"}):
        with pytest.raises(ValidationError):
            SamplingConfig.model_validate({"decoder": decoder})
    with pytest.raises(ConfigError, match="no effect at scale=0"):
        Guidance(blocks="first")


def test_denoising_in_parts_is_denoising_at_once(flow: Flow) -> None:
    flow.pixels = PixelFormat(bit_depth=4, noise="gaussian", noise_std=0.1)
    noisy = torch.cat(list(Sampler(flow, 1, SamplingConfig(batch_size=7)).floats(range(7))))
    found = torch.cat(list(Sampler(flow, 1, SamplingConfig(batch_size=7, denoise=1.0)).floats(range(7))))
    expected = flow.denoised(noisy, balanced_labels(range(7), 3), 0.1)
    assert (found - expected).abs().max() < 1e-5
    assert (found - noisy).abs().max() > 1e-3


def test_images_encode_back_and_a_model_that_amplifies_is_told(flow: Flow) -> None:
    drawn = sampler(flow, 8)
    assert drawn.round_trip_error() is None
    list(drawn.floats(range(8)))
    error = drawn.round_trip_error()
    assert error is not None
    assert 0 < error < 1e-3
    with torch.no_grad():
        flow.blocks[0].proj_out.bias[:4] -= 9.0  # type: ignore[union-attr,index]  # scales by e^-9 on decoding
    list(drawn.floats(range(8)))
    amplified = drawn.round_trip_error()
    assert amplified is not None
    assert amplified > 100 * error
    guided = sampler(flow, 8, guidance=1.0)
    list(guided.floats(range(8)))
    assert guided.round_trip_error() is None
