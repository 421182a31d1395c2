"""Pixels, nats and bits: closed forms."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from tarflow_scale.flows import standard_normal_log_prob
from tarflow_scale.flows.likelihood import (
    add_noise,
    bits_per_dim,
    combine_draws,
    nats_per_image,
    quantize,
    rounding_of,
    to_levels,
)
from tarflow_scale.flows.logits import from_logits, to_logits
from tarflow_scale.records import PixelFormat

ALL_BYTES = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("noise", ["uniform", "gaussian"])
def test_quantising_undoes_the_noise_for_every_byte(bits: int, noise: str) -> None:
    pixels = PixelFormat(bit_depth=bits, noise=noise, noise_std=0.4 / 2**bits if noise == "gaussian" else 0)
    draw = torch.rand(ALL_BYTES.shape) if noise == "uniform" else torch.randn(ALL_BYTES.shape).clamp(-2, 2)
    kept = ALL_BYTES.clone()
    x = add_noise(ALL_BYTES, draw, pixels)
    assert (kept == ALL_BYTES).all()
    stored = quantize(x, bits, rounding_of(pixels))
    assert (to_levels(stored, bits) == to_levels(ALL_BYTES, bits)).all()


@pytest.mark.parametrize("bits", range(1, 9))
def test_uniform_noise_stays_inside_its_bin(bits: int) -> None:
    pixels = PixelFormat(bit_depth=bits, noise="uniform")
    low = add_noise(ALL_BYTES, torch.zeros(ALL_BYTES.shape, dtype=torch.float64), pixels)
    high = add_noise(ALL_BYTES, torch.full(ALL_BYTES.shape, 1 - 1e-9, dtype=torch.float64), pixels)
    assert low.min() == -1
    assert high.max() < 1
    assert (high - low).max() < 2 / 2**bits


def test_four_bit_digits_are_stored_as_multiples_of_17() -> None:
    levels = torch.arange(16).reshape(1, 1, 4, 4)
    x = (levels + 0.5) / 8 - 1
    assert (quantize(x, 4, "floor") == 17 * levels).all()


def test_values_outside_are_clipped() -> None:
    x = torch.tensor([-7.0, -1.0, 1.0, 7.0]).reshape(1, 1, 2, 2)
    for rounding in ("floor", "nearest"):
        assert quantize(x, 8, rounding).flatten().tolist() == [0, 0, 255, 255]


@pytest.mark.parametrize("bits", [1, 4, 5, 8])
def test_a_uniform_density_costs_exactly_n_bits(bits: int) -> None:
    num_dims = 48
    log_prob = torch.full((3,), -num_dims * math.log(2.0), dtype=torch.float64)  # density 1/2 on [-1, 1]
    assert (bits_per_dim(log_prob, num_dims, bits) - bits).abs().max() < 1e-12


@pytest.mark.parametrize(("bits", "expected"), [(8, 8.254614), (5, 5.254614)])
def test_a_moment_matched_gaussian_on_uniform_pixels(bits: int, expected: float) -> None:
    """U(-1, 1) has variance 1/3; the cross-entropy is 0.5 ln(2 pi e / 3) nats, and ln 2 for the uniform density."""
    scale = math.sqrt(1 / 3)
    grid = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 100_000 - 1
    log_prob = standard_normal_log_prob((grid / scale)[:, None]) - math.log(scale)
    assert float(bits_per_dim(log_prob.mean()[None], 1, bits)) == pytest.approx(expected, abs=1e-6)


def test_the_normal_is_summed_over_dimensions_in_fp32() -> None:
    z = torch.randn(4, 10, dtype=torch.float64)
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(dim=1)
    assert (standard_normal_log_prob(z) - expected).abs().max() < 1e-12
    assert standard_normal_log_prob(z.bfloat16()).dtype == torch.float32


@given(bits=st.integers(1, 8), channels=st.integers(1, 5), size=st.integers(1, 6), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_dequantized_images_quantize_to_themselves(bits: int, channels: int, size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (2, channels, size, size), dtype=torch.uint8, generator=generator)
    noise = torch.rand(images.shape, generator=generator)
    x = add_noise(images, noise, PixelFormat(bit_depth=bits, noise="uniform"))
    assert (to_levels(quantize(x, bits, "floor"), bits) == images >> (8 - bits)).all()


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_depths_outside_1_to_8_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=rf"bit_depth must be 1 to 8 \(got {bits}\)"):
        to_levels(ALL_BYTES, bits)
    with pytest.raises(ValueError, match=rf"\(got {bits}\)"):
        quantize(torch.zeros(1, 1, 2, 2), bits, "floor")


def test_nats_of_an_image_are_its_bits_times_ln_2() -> None:
    log_prob = torch.tensor([-3.0, 5.0], dtype=torch.float64)
    expected = bits_per_dim(log_prob, 12, 5) * 12 * math.log(2)
    assert (nats_per_image(log_prob, 12, 5) - expected).abs().max() < 1e-12


# -- several draws -----------------------------------------------------------------------------------------------------


def test_the_importance_weighted_estimate_converges_to_the_cost_of_the_discrete_image() -> None:
    """One 1-bit pixel under N(0.3, 0.7): the mean over draws is Jensen's bound, the weighted estimate is exact."""
    normal = torch.distributions.Normal(torch.tensor(0.3, dtype=torch.float64), 0.7)
    mass = normal.cdf(torch.tensor(1.0)) - normal.cdf(torch.tensor(0.0))  # the upper bin, [0, 1)
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    draws = normal.log_prob(u)[:, None]
    exact = -mass.log2()
    bound = bits_per_dim(combine_draws(draws, "mean"), 1, 1)
    weighted = bits_per_dim(combine_draws(draws, "importance"), 1, 1)
    assert float(weighted) == pytest.approx(float(exact), abs=1e-8)
    assert float(bound) > float(exact) + 0.01


def test_the_importance_weighted_estimate_is_never_looser() -> None:
    draws = torch.randn(7, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert (combine_draws(draws, "importance") > combine_draws(draws, "mean")).all()
    assert torch.equal(combine_draws(draws[:1], "importance"), combine_draws(draws[:1], "mean"))
    huge = torch.full((3, 2), -1e6, dtype=torch.float64)
    assert torch.isfinite(combine_draws(huge, "importance")).all()


# -- logit transform ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [1e-6, 0.05])
def test_the_logit_transform_is_exact(alpha: float) -> None:
    x = 2 * torch.rand(3, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 1
    h, log_det = to_logits(x, alpha)
    assert (from_logits(h, alpha) - x).abs().max() < 1e-12
    for i in range(3):
        jacobian = torch.autograd.functional.jacobian(lambda v: to_logits(v[None], alpha)[0][0], x[i]).reshape(4, 4)
        assert abs(float(log_det[i] - torch.linalg.slogdet(jacobian).logabsdet)) < 1e-10


@pytest.mark.parametrize("alpha", [1e-6, 0.05])
@pytest.mark.parametrize("bits", [5, 8])
def test_a_logistic_behind_the_logit_costs_exactly_the_depth(alpha: float, bits: int) -> None:
    """Its density on [-1, 1] is (1 - 2 alpha) / 2, uniform."""
    x = 2 * torch.rand(4, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 1
    h, log_det = to_logits(x, alpha)
    logistic = -(torch.nn.functional.softplus(h) + torch.nn.functional.softplus(-h)).flatten(1).sum(dim=1)
    expected = bits - math.log2(1 - 2 * alpha)
    assert (bits_per_dim(logistic + log_det, 12, bits) - expected).abs().max() < 1e-10
