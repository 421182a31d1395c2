"""Properties of Glow: latents of all levels, initialisation, rebuilt activations at depth, the large recipe."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from tarflow_scale.config.model import GlowConfig
from tarflow_scale.config.sampling import Guidance
from tarflow_scale.config.train import TrainConfig
from tarflow_scale.flows import build
from tarflow_scale.flows.coupling import ActNorm, unsqueeze
from tarflow_scale.flows.glow import Glow
from tests.conftest import TOP
from tests.flows import conformance
from tests.flows.catalogue import moved


def small(shape: tuple[int, int, int] = (3, 8, 8), classes: int | None = None, **options: object) -> Glow:
    """A float64 Glow, initialised on random images, with moved weights."""
    torch.manual_seed(0)
    flow = Glow(shape, classes, GlowConfig(**({"levels": 2, "steps_per_level": 2, "width": 8} | options))).double()  # type: ignore[arg-type]
    flow.initialize(torch.randn(8, *shape, dtype=torch.float64))
    moved(flow, ("",))
    return flow


@given(
    channels=st.integers(1, 3),
    rows=st.integers(1, 2),
    columns=st.integers(1, 3),
    levels=st.integers(1, 2),
    steps=st.integers(1, 2),
    coupling=st.sampled_from(["affine", "additive"]),
    convolution=st.sampled_from(["dense", "lu"]),
    classes=st.sampled_from([None, 2]),
)
@settings(max_examples=12, deadline=None)
def test_any_shape_keeps_the_contract(
    channels: int,
    rows: int,
    columns: int,
    levels: int,
    steps: int,
    coupling: str,
    convolution: str,
    classes: int | None,
) -> None:
    shape = (channels, rows * 2**levels, columns * 2**levels)
    flow = small(
        shape, classes, levels=levels, steps_per_level=steps, width=4, coupling=coupling, convolution=convolution
    )
    x = torch.randn(1, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = None if classes is None else torch.tensor([1])
    conformance.check_flow_log_det(flow, x, y)
    conformance.check_flow_inverse(flow, x, y)


def test_every_level_gives_out_latents_and_each_matters() -> None:
    flow = small((3, 16, 16), levels=3)
    assert flow.latent_shapes == [(6, 8, 8), (12, 4, 4), (48, 2, 2)]
    z = torch.zeros(1, flow.num_dims, dtype=torch.float64)
    start = 0
    with torch.no_grad():
        origin = flow.inverse(z)
        for channels, height, width in flow.latent_shapes:
            moved_z = z.clone()
            moved_z[0, start] = 1.0
            assert (flow.inverse(moved_z) - origin).abs().max() > 1e-3
            start += channels * height * width
    assert start == flow.num_dims


def test_a_fresh_flow_starts_from_unit_activations() -> None:
    torch.manual_seed(0)
    flow = Glow((3, 8, 8), None, GlowConfig(levels=2, steps_per_level=3, width=8))
    x = 0.2 + 0.1 * torch.randn(64, 3, 8, 8)
    with pytest.raises(RuntimeError, match="ActNorm was never initialised"):
        flow(x)
    with pytest.raises(RuntimeError, match="ActNorm was never initialised"):
        flow.inverse(torch.zeros(1, flow.num_dims))
    flow.initialize(x)
    assert all(bool(module.initialized) for module in flow.modules() if isinstance(module, ActNorm))
    z, _ = flow(x)
    assert 0.3 < float(z.std()) < 3
    assert not any(module._forward_pre_hooks for module in flow.modules())


def test_denoising_leaves_no_gradients_behind() -> None:
    flow = small()
    flow.activations = "rebuild"
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    rebuilt = flow.denoised(x, None, 0.1)
    assert all(parameter.grad is None for parameter in flow.parameters())
    assert flow.activations == "rebuild"
    flow.activations = "keep"
    assert torch.equal(flow.denoised(x, None, 0.1), rebuilt)


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["keep", "rebuild"])
def test_fp32_on_cuda_is_no_tf32(how: str) -> None:
    """Tensor cores must not shorten mantissas in 1x1 convolutions; the inverse and rebuilt gradients would be wrong."""
    flow = small((3, 8, 8), levels=1, steps_per_level=32, width=16).float()
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    expected = conformance.gradients(flow, x, None)
    flow = flow.cuda()
    with torch.no_grad():
        assert (flow.inverse(flow(x.cuda())[0]).cpu() - x).abs().max() < 1e-3
    flow.activations = how  # type: ignore[assignment]
    found = {name: value.cpu() for name, value in conformance.gradients(flow, x.cuda(), None).items()}
    assert conformance.relative_difference(found, expected) < 1e-2


@pytest.mark.parametrize("how", ["checkpoint", "rebuild"])
def test_gradients_at_depth_32_in_fp32(how: str) -> None:
    """With K = 32 steps the rounding errors of inverses, limited by anchors, stay below 1e-3 of the gradient."""
    flow = small((3, 8, 8), levels=1, steps_per_level=32, width=16).float()
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    expected = conformance.gradients(flow, x, None)
    flow.activations = how  # type: ignore[assignment]
    found = conformance.gradients(flow, x, None)
    assert conformance.relative_difference(found, expected) < 1e-3
    for name in expected:
        scale = expected[name].abs().max()
        assert (found[name] - expected[name]).abs().max() < 1e-2 * scale + 1e-7, name


def test_rebuilding_runs_each_network_twice_not_three_times() -> None:
    """Once forward and once backward, because the inverse and the gradient share a run."""
    flow = small(levels=1, steps_per_level=3)
    flow.activations = "rebuild"
    calls: list[int] = []
    for step in flow.levels[0].steps:  # type: ignore[union-attr]
        step.couple.network.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    conformance.gradients(flow, x, None)
    assert len(calls) == 2 * 3


def test_rebuilding_keeps_no_activations_of_the_steps() -> None:
    """The memory that autograd saves grows only by one feature map per anchor."""
    kept: dict[tuple[str, int], int] = {}
    for steps in (8, 32):
        flow = small((3, 8, 8), levels=1, steps_per_level=steps, width=32)
        for how in ("keep", "rebuild"):
            flow.activations = how  # type: ignore[assignment]
            sizes: list[int] = []
            x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
            with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: (s.append(t.numel()), t)[1], lambda t: t):
                flow(x)
            kept[how, steps] = sum(sizes)
    anchor = 2 * 3 * 8 * 8
    assert kept["rebuild", 32] - kept["rebuild", 8] <= 3 * anchor + 64
    assert kept["keep", 32] > 3 * kept["keep", 8]


@pytest.mark.parametrize("what", ["both", "mean", "log_scale"])
@torch.no_grad()
def test_guidance_moves_the_priors_by_the_rule(what: str) -> None:
    """With one level the prior is a Gaussian per class; the test writes out its guided form."""
    flow = small((1, 4, 4), classes=3, levels=1)
    (level,) = flow.levels
    y = torch.tensor([0, 1, 2])
    z = torch.randn(3, flow.num_dims, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (mean, log_std), (weak_mean, weak_log_std) = level.prior(None, y), level.prior(None, None)
    assert (mean - weak_mean).abs().min() > 1e-4
    if what != "log_scale":
        mean = 2.5 * mean - 1.5 * weak_mean
    if what != "mean":
        log_std = 2.5 * log_std - 1.5 * weak_log_std
    h = z.reshape(3, *flow.latent_shapes[0]) * log_std.exp() + mean
    for group in reversed(level.groups):  # type: ignore[operator]
        for layer in reversed(group):
            h = layer.inverse(h)
    guided = flow.inverse(z, y, Guidance(scale=1.5, what=what))  # type: ignore[arg-type]
    assert (guided - unsqueeze(h)).abs().max() < 1e-10
    assert (guided - flow.inverse(z, y)).abs().max() > 1e-3


def test_guidance_needs_classes_and_labels() -> None:
    z = torch.zeros(3, 192, dtype=torch.float64)
    for labels, classes in ((None, 3), (None, None)):
        with pytest.raises(ValueError, match=r"guidance of Glow needs classes and labels \(got scale=1"):
            small(classes=classes).inverse(z, labels, Guidance(scale=1))


def test_settings_of_tarflow_are_refused() -> None:
    z, y = torch.zeros(1, 192, dtype=torch.float64), torch.tensor([0])
    for option in ({"annealed": True}, {"attention_temperature": 0.5}):
        with pytest.raises(ValueError, match="annealed and attention_temperature have no effect on Glow"):
            small(classes=2).inverse(z, y, Guidance(scale=1, **option))  # type: ignore[arg-type]


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"multiples of 2\^model.levels \(got 28x28 and 2\^3 = 8\)"):
        Glow((1, 28, 28), None, GlowConfig(levels=3, steps_per_level=1, width=8))


def test_the_large_recipe_builds() -> None:
    """256x256, 6 levels of 32 steps, 5 bits, as published; evals/benchmarks/glow_memory.py takes a training step."""
    config = TrainConfig.load(TOP / "configs/train/celebahq256-glow.yaml", [])
    assert isinstance(config.model, GlowConfig)
    with torch.device("meta"):
        flow = build(config.model, (3, 256, 256), None)
    assert isinstance(flow, Glow)
    assert flow.latent_shapes[-1] == (384, 4, 4)
    assert flow.latent_shapes[0] == (6, 128, 128)
    assert (config.model.levels, config.model.steps_per_level, config.model.coupling) == (6, 32, "additive")
    assert config.parallelism.activations == "rebuild"


def test_surprise_of_a_place_is_that_of_what_its_coupling_sees() -> None:
    """One step has a 3x3, a 1x1 and a 3x3 convolution, which reach two places; a place is 2x2 pixels."""
    flow = small((1, 16, 16), levels=1, steps_per_level=1)
    x = torch.randn(1, 1, 16, 16, dtype=torch.float64)
    other = x.clone()
    other[0, 0, 0, 0] += 1
    nats = flow.nats_of_values(x)
    places = unsqueeze(nats[:, :, ::2, ::2].repeat(1, 4, 1, 1))
    assert torch.allclose(nats, places, rtol=0, atol=0)  # even inside a place
    changed = (nats != flow.nats_of_values(other))[0, 0]
    assert changed[:6, :6].any(dim=1).all()
    assert not changed[6:].any()
    assert not changed[:, 6:].any()
