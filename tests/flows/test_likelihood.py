"""Pixels, nats and bits: closed forms."""

import math

import pytest
import torch

from tarflow_scale.flows import standard_normal_log_prob
from tarflow_scale.flows.likelihood import add_noise, bits_per_dim, quantize, rounding_of, to_levels
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
    """Variance of U(-1, 1) is 1/3; cross-entropy 0.5 ln(2 pi e / 3) nats, against ln 2 for the uniform density."""
    scale = math.sqrt(1 / 3)
    grid = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 100_000 - 1
    log_prob = standard_normal_log_prob((grid / scale)[:, None]) - math.log(scale)
    assert float(bits_per_dim(log_prob.mean()[None], 1, bits)) == pytest.approx(expected, abs=1e-6)


def test_the_normal_is_summed_over_dimensions_in_fp32() -> None:
    z = torch.randn(4, 10, dtype=torch.float64)
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(dim=1)
    assert (standard_normal_log_prob(z) - expected).abs().max() < 1e-12
    assert standard_normal_log_prob(z.bfloat16()).dtype == torch.float32
