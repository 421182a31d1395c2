"""Learned noise: its density is exact, it stays in its bin, and its bound is valid and tighter."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tarflow_scale.config.model import DequantizationConfig, MAFConfig, ModelConfig, NICEConfig, TarFlowConfig
from tarflow_scale.errors import ConfigError
from tarflow_scale.flows import Flow, build, load_flow, save_flow
from tarflow_scale.flows.dequantization import Dequantizer
from tarflow_scale.flows.likelihood import add_noise, bits_per_dim, combine_draws, quantize, to_levels
from tarflow_scale.records import PixelFormat
from tests.flows.catalogue import FLOWS, FlowCase, moved
from tests.flows.conformance import jacobian_log_det

LEARNED = DequantizationConfig(couplings=3, width=6)
DEPTHS = range(1, 9)


def noisy(bits: int, batch: int = 4, shape: tuple[int, ...] = (2, 2, 3), dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(bits)
    images = torch.randint(0, 256, (batch, *shape), generator=generator).to(torch.uint8)
    noise = torch.rand(images.shape, generator=generator, dtype=dtype)
    return add_noise(images, noise, PixelFormat(bit_depth=bits, noise="uniform"))


def dequantizer(channels: int = 2, dtype: torch.dtype = torch.float64) -> Dequantizer:
    """A dequantizer with moved weights."""
    torch.manual_seed(0)
    made = Dequantizer(channels, couplings=3, width=6).double()
    moved(made, ())
    return made.to(dtype)


def with_noise(config: ModelConfig) -> ModelConfig:
    return config.model_copy(update={"dequantization": LEARNED})


def ready(case: FlowCase, bits: int = 4, dtype: torch.dtype = torch.float64) -> Flow:
    """A flow with moved weights and learned noise, in training mode."""
    torch.manual_seed(0)
    flow = build(with_noise(case.config), case.event_shape, case.num_classes).double()
    flow.pixels = PixelFormat(bit_depth=bits, noise="uniform")
    flow.initialize(*case.data(16))
    moved(flow, case.cautious)
    assert flow.dequantizer is not None
    moved(flow.dequantizer, ())
    return flow.to(dtype).train()


ONE_OF_A_KIND = [case for case in FLOWS if case.name.endswith("_conditional") and "glow" not in case.name] + [
    case for case in FLOWS if case.name in ("glow_lu_affine_conditional", "realnvp_batch", "continuous_direct")
]
LOGIT = [case for case in FLOWS if case.name.endswith("_logit")]


# -- the density of noise ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", DEPTHS)
def test_log_q_is_that_of_the_jacobian(bits: int) -> None:
    """The Jacobian of u' by u equals that of x' by x, because bins of both have the same width."""
    q, x = dequantizer(), noisy(bits, batch=2)
    with torch.no_grad():
        _, log_q = q(x, bits)
    assert log_q.abs().amax(dim=(1, 2, 3)).amin() > 0.1
    for i in range(len(x)):
        expected = -jacobian_log_det(lambda v: q(v, bits)[0], x[i])
        assert abs(float(log_q[i].sum()) - expected) < 1e-8


def test_log_q_integrates_to_one_over_a_bin() -> None:
    """For noise u on a grid: q(u') du' equals du."""
    q = dequantizer(channels=1)
    num = 10_001
    u = (torch.arange(num, dtype=torch.float64) + 0.5) / num
    x = torch.stack([2 * (1 + u) / 4 - 1, torch.full_like(u, 2 * 2.3 / 4 - 1)], dim=1).view(num, 1, 1, 2)
    with torch.no_grad():
        moved_x, log_q = q(x, 2)
    at = (moved_x[:, 0, 0, 0] + 1) / 0.5 - 1
    assert (at.diff() > 0).all()
    middle = (log_q[1:, 0, 0, 0].exp() + log_q[:-1, 0, 0, 0].exp()) / 2
    assert float((middle * at.diff()).sum()) == pytest.approx(1, abs=1e-3)
    assert log_q[:, 0, 0, 0].exp().max() > 1.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bits", DEPTHS)
def test_noise_stays_in_its_bin(bits: int, dtype: torch.dtype) -> None:
    """Also for noise that floats round to an edge, and for the largest possible moves."""
    images = torch.arange(256).to(torch.uint8).view(16, 1, 4, 4)
    edges = (0.0, 1e-9, 0.5, 1 - 1e-9, float(1 - 2.0**-24))
    pixels = PixelFormat(bit_depth=bits, noise="uniform")
    for size, u in itertools.product((1, 50, -50), edges):
        q = dequantizer(channels=1, dtype=dtype)
        with torch.no_grad():
            q.couplings[0].conv_out.bias[0].add_(size)  # type: ignore[union-attr, index]
        x = add_noise(images, torch.full(images.shape, u, dtype=dtype), pixels)
        with torch.no_grad():
            there, log_q = q(x, bits)
        assert torch.isfinite(log_q).all()
        assert (there >= -1).all()
        assert (there <= 1).all()
        bins = [((v + 1) * 2 ** (bits - 1)).floor().clamp(max=2**bits - 1) for v in (x, there)]
        assert torch.equal(*bins)
        if dtype == torch.float32:
            assert torch.equal(quantize(there, bits, "floor"), quantize(x, bits, "floor"))
        if 1e-9 < u < 0.9:
            assert torch.equal(bins[1].to(torch.uint8), to_levels(images, bits))
            assert not torch.equal(there, x)


def test_noise_depends_on_levels_and_labels_do_not_change_it() -> None:
    q = dequantizer()
    x = noisy(3, batch=1)
    other = x.clone()
    other[0, 0, 0, 0] += 0.25 * (1 if x[0, 0, 0, 0] < 0.5 else -1)  # the same u, one level further
    near = ((q(x, 3)[0] - q(other, 3)[0]).abs() > 1e-6)[0]
    assert near[:, 0, 1].all()


def test_log_q_is_wide_under_autocast() -> None:
    """Only networks run in bf16, so the log-scales agree with the slopes of the result to the precision of fp32."""
    q, x = dequantizer(dtype=torch.float32), noisy(4, dtype=torch.float32)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        there, log_q = q(x, 4)
    assert there.dtype == log_q.dtype == torch.float32
    found = there.detach()
    wide, wide_log_q = q(x, 4)
    assert 0 < (log_q - wide_log_q).abs().max() < 0.1
    assert 0 < (found - wide).abs().max() < 0.01
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = x.requires_grad_()
        there, log_q = q(x, 4)
        # With one pixel changed, its own slope is the diagonal of a Jacobian that is triangular.
        (slope,) = torch.autograd.grad(there[0, 0, 0, 0], x)
    assert float(-slope[0, 0, 0, 0].log()) == pytest.approx(float(log_q[0, 0, 0, 0].detach()), abs=0.05)


# -- the flow ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bits", DEPTHS)
def test_a_fresh_one_is_uniform_noise_to_the_last_bit(bits: int, dtype: torch.dtype) -> None:
    x = noisy(bits, shape=(1, 4, 6), dtype=dtype)
    x[0, 0, 0, 0], x[0, 0, 0, 1] = -1, 1  # what floats may round noise to
    case = next(case for case in FLOWS if case.name == "realnvp_unconditional")
    flow = ready(case, bits, dtype)
    flow.dequantizer = Dequantizer(1, couplings=4, width=8).to(dtype)
    assert torch.equal(flow.log_prob_of_images(x), flow.log_prob(x))
    flow.dequantizer = dequantizer(1, dtype)
    assert not torch.equal(flow.log_prob_of_images(x), flow.log_prob(x))


def test_it_does_not_change_how_the_flow_starts() -> None:
    flows = []
    for config in (ONE_OF_A_KIND[0].config, with_noise(ONE_OF_A_KIND[0].config)):
        torch.manual_seed(0)
        flows.append(build(config, (1, 4, 6), 3).state_dict())
    plain, learned = flows
    assert all(torch.equal(tensor, learned[name]) for name, tensor in plain.items())
    assert {name.split(".")[0] for name in learned.keys() - plain.keys()} == {"dequantizer"}
    assert list(learned)[: len(plain)] == list(plain)


@pytest.mark.parametrize("case", ONE_OF_A_KIND + LOGIT, ids=lambda case: case.name)
def test_every_flow_learns_it(case: FlowCase) -> None:
    """The bound is log p(x') - log q, and its gradients reach every parameter with any choice of activations."""
    x = noisy(4, batch=4, shape=case.event_shape)
    y = case.data(4)[1]
    expected = None
    for how in case.activations:
        flow = ready(case)
        assert flow.dequantizer is not None
        flow.activations = how
        torch.manual_seed(1)  # probes of a continuous flow
        z, log_det = flow(x, y, dequantize=True)
        (0.5 * z.square().sum() - log_det.sum()).backward()
        found = {name: one.grad for name, one in flow.dequantizer.named_parameters()}
        assert all(one is not None and one.isfinite().all() and one.abs().sum() > 0 for one in found.values())
        for name, one in (expected or found).items():
            assert torch.allclose(found[name], one, rtol=1e-6, atol=1e-9), (how, name)
        expected = expected or found
    flow.eval()
    there, log_q = flow.dequantizer(x, 4)
    assert (there - x).abs().max() > 0.01
    bound = flow.log_prob(there, y) - log_q.flatten(1).sum(dim=1)
    assert torch.allclose(flow.log_prob_of_images(x, y), bound, rtol=1e-10, atol=1e-8)


@pytest.mark.parametrize("case", [case for case in FLOWS if case.name in ("tarflow_logit", "nice_logit")])
def test_the_surprise_of_values_adds_up_to_the_bound(case: FlowCase) -> None:
    flow, x = ready(case).eval(), noisy(4, shape=case.event_shape)
    nats = flow.nats_of_values(x, dequantize=True)
    assert nats.shape == x.shape
    assert torch.allclose(nats.flatten(1).sum(dim=1), -flow.log_prob_of_images(x), rtol=1e-10)
    assert torch.allclose(flow.nats_of_values(x).flatten(1).sum(dim=1), -flow.log_prob(x), rtol=1e-10)


def test_what_it_needs() -> None:
    with pytest.raises(ConfigError, match=r"dequantization is for images \(got vectors of shape \(3,\)\); remove it"):
        build(MAFConfig(dequantization=LEARNED, class_conditional=False), (3,))
    flow = build(NICEConfig(dequantization=LEARNED, class_conditional=False), (1, 2, 2))
    x = noisy(4, shape=(1, 2, 2), dtype=torch.float32)
    assert torch.isfinite(flow.log_prob(x)).all()
    with pytest.raises(ValueError, match=r"dequantization needs the bit depth of the images \(got a flow without"):
        flow.log_prob_of_images(x)
    flow.pixels = PixelFormat(bit_depth=4, noise="uniform")
    with pytest.raises(ValueError, match="images must be finite"):
        flow.log_prob_of_images(x * math.nan)


def test_a_saved_one_comes_back_and_old_files_load(tmp_path: Path) -> None:
    case = next(case for case in FLOWS if case.name == "realnvp_conditional")
    flow, x = ready(case, dtype=torch.float32).eval(), noisy(4, shape=case.event_shape, dtype=torch.float32)
    save_flow(flow, str(tmp_path / "learned"))
    loaded = load_flow(str(tmp_path / "learned"))
    assert loaded.config == with_noise(case.config)
    y = torch.arange(4) % 3
    assert torch.equal(loaded.log_prob_of_images(x, y), flow.log_prob_of_images(x, y))
    save_flow(case.flow(torch.float32), str(tmp_path / "plain"))
    assert "dequantization" not in (tmp_path / "plain/config.json").read_text()
    assert load_flow(str(tmp_path / "plain")).dequantizer is None


# -- the bound ---------------------------------------------------------------------------------------------------------

SHAPE = (1, 1, 2)
IMAGES = torch.tensor(list(itertools.product((0, 255), repeat=2))).to(torch.uint8).view(4, *SHAPE)
"""All images of two pixels of one bit."""


def two_pixels(strength: float = 1.0) -> Flow:
    torch.manual_seed(0)
    config = NICEConfig(couplings=2, width=8, hidden_layers=1, class_conditional=False, dequantization=LEARNED)
    flow = build(config, SHAPE).double()
    flow.pixels = PixelFormat(bit_depth=1, noise="uniform")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(strength * 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return flow.eval()


@torch.no_grad()
def log_masses(flow: Flow, side: int = 200) -> Tensor:
    """Logarithm of the integral of the density over the bins of each of `IMAGES`, by the midpoint rule."""
    u = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    grid = torch.cartesian_prod(u, u)  # on the lower bin of both pixels, after -1
    found = []
    for image in IMAGES:
        x = grid.view(-1, *SHAPE) - 1 + (image > 0).double()
        found.append(torch.logsumexp(flow.log_prob(x), dim=0) - math.log(len(grid)))
    return torch.stack(found)


@torch.no_grad()
def bounds(flow: Flow, num: int, images: Tensor = IMAGES) -> Tensor:
    """Draws ``(num, images)`` of the bound."""
    assert flow.pixels is not None
    noise = torch.rand(num, *images.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    x = add_noise(images.expand(num, *images.shape).flatten(0, 1), noise.flatten(0, 1), flow.pixels)
    return flow.log_prob_of_images(x).view(num, len(images))


def check_bound(flow: Flow) -> None:
    """The mean bound is below the log mass, and the mean of densities, which has no bias, equals it within 3 errors."""
    exact, draws = log_masses(flow), bounds(flow, 4000)
    error = draws.std(dim=0) / math.sqrt(len(draws))
    assert (draws.mean(dim=0) <= exact + 3 * error).all()
    ratio = (draws - exact).exp()
    assert ((ratio.mean(dim=0) - 1).abs() < 3 * ratio.std(dim=0) / math.sqrt(len(ratio))).all()
    weighted = torch.stack([combine_draws(some, "importance") for some in draws.split(10)])
    assert (weighted.mean(dim=0) > draws.mean(dim=0) + 3 * error).all()
    error = weighted.std(dim=0) / math.sqrt(len(weighted))
    assert (weighted.mean(dim=0) <= exact + 3 * error).all()


def test_the_bound_is_one_and_more_draws_tighten_it() -> None:
    """Bins of 1 bit have width 1 on [-1, 1], so masses need no factor; the next test covers other depths."""
    flow = two_pixels()
    check_bound(flow)
    assert float(log_masses(flow).exp().sum()) < 1  # the rest is outside of [-1, 1]


def test_units_of_the_bound_fit_the_formula_of_bits_at_another_depth() -> None:
    """The mass of a bin of a 3-bit image of two pixels, with sides 2 / 2^3, equals -bits/dim of many weighted draws."""
    flow, bits = two_pixels(), 3
    flow.pixels = PixelFormat(bit_depth=bits, noise="uniform")
    levels = torch.tensor([[3, 5]])
    image = (levels << 5).to(torch.uint8).view(1, *SHAPE)
    side = 200
    u = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    x = 2 * (levels + torch.cartesian_prod(u, u)) / 2**bits - 1
    with torch.no_grad():
        density = torch.logsumexp(flow.log_prob(x.view(-1, *SHAPE)), dim=0) - 2 * math.log(side)
    exact = -float(density + 2 * math.log(2 / 2**bits)) / (2 * math.log(2))
    draws = bounds(flow, 5000, image)
    found = bits_per_dim(combine_draws(draws, "importance"), 2, bits)
    assert float(found) == pytest.approx(exact, abs=0.01)
    assert float(bits_per_dim(combine_draws(draws, "mean"), 2, bits)) > exact + 0.01


def scaled(factor: float) -> Callable[[Callable], Callable]:
    def mutate(right: Callable) -> Callable:
        def wrong(self: Dequantizer, x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
            there, log_q = right(self, x, bits)
            return there, factor * log_q

        return wrong

    return mutate


def shifted(right: Callable) -> Callable:
    """A wrong q, counted on [-1, 1] with its bins on [0, 1): wrong by the logarithm of the widths of bins."""

    def wrong(self: Dequantizer, x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        there, log_q = right(self, x, bits)
        return there, log_q - math.log(2)

    return wrong


@pytest.mark.parametrize(
    "mutation", [scaled(-1), scaled(2), scaled(0), shifted], ids=["sign", "doubled", "dropped", "units"]
)
def test_a_wrong_log_q_is_no_bound(mutation: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    flow = two_pixels()
    monkeypatch.setattr(Dequantizer, "forward", mutation(Dequantizer.forward))
    with pytest.raises(AssertionError):
        check_bound(flow)


# -- what it is good for -----------------------------------------------------------------------------------------------


def trained_bits(learned: bool, steps: int = 300) -> float:
    """Bits/dim of a flow on checked 2-bit images after some steps, with the same noise for both kinds."""
    torch.manual_seed(0)
    noise = DequantizationConfig(couplings=2, width=8) if learned else None
    config = NICEConfig(couplings=3, width=32, hidden_layers=1, class_conditional=False, dequantization=noise)
    flow = build(config, (1, 4, 4))
    flow.pixels = PixelFormat(bit_depth=2, noise="uniform")
    generator = torch.Generator().manual_seed(1)
    rows = (torch.arange(4)[:, None] + torch.arange(4)) % 2
    images = (torch.stack([rows, 1 - rows])[:, None] * 255).to(torch.uint8)

    def draw(num: int) -> Tensor:
        chosen = images[torch.randint(0, 2, (num,), generator=generator)]
        return add_noise(chosen, torch.rand(chosen.shape, generator=generator), flow.pixels)  # type: ignore[arg-type]

    flow.initialize(draw(64))
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        (-flow.log_prob_of_images(draw(64)).mean()).backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 10.0)
        optimizer.step()
    with torch.no_grad():
        return float(bits_per_dim(flow.eval().log_prob_of_images(draw(1000)), 16, 2).mean())


def test_learned_noise_gives_a_tighter_bound_than_uniform_noise() -> None:
    """The images have 1 bit of information, 0.0625 bits/dim, which is the least possible bound."""
    uniform, learned = trained_bits(False), trained_bits(True)
    assert 0.06 < learned < uniform - 0.05, (learned, uniform)


def test_muon_leaves_it_to_adamw() -> None:
    from tarflow_scale.flows.build import matrices

    config = TarFlowConfig(patch_size=2, width=16, head_width=8, layers_per_block=(1,), dequantization=LEARNED)
    flow = build(config, (1, 4, 4), 3)
    assert flow.dequantizer is not None
    assert not {id(one) for one in matrices(flow)} & {id(one) for one in flow.dequantizer.parameters()}
    assert matrices(flow)
