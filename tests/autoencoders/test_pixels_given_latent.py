"""Distributions of pixels: bins have the probability of their definition, also in the tails."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from scipy import stats
from torch import Tensor

from tarflow_scale.autoencoders.pixels_given_latent import log_bins, log_density

MEANS = (-1.4, -0.31, 0.0, 0.999, 4.0)
SCALES = (-9.0, -4.0, -1.5, 2.0)
KINDS = {"logistic": stats.logistic, "gaussian": stats.norm}


def bins(kind: str, bit_depth: int, mean: float, log_scale: float, dtype: torch.dtype) -> Tensor:
    levels = torch.arange(2**bit_depth, dtype=torch.uint8).view(-1, 1, 1, 1)
    means = torch.full(levels.shape, mean, dtype=dtype)
    return log_bins(kind, levels, bit_depth, means, torch.tensor([log_scale], dtype=dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("log_scale", SCALES)
@pytest.mark.parametrize(("dtype", "exact"), [(torch.float64, 1e-9), (torch.float32, 2e-4)])
def test_the_bins_of_a_pixel_have_probability_one(
    kind: str, mean: float, log_scale: float, dtype: torch.dtype, exact: float
) -> None:
    log_prob = bins(kind, 8, mean, log_scale, dtype)
    assert torch.isfinite(log_prob).all()
    assert abs(float(torch.logsumexp(log_prob, 0))) < exact


@pytest.mark.parametrize("kind", KINDS)
def test_a_bin_is_a_difference_of_the_distribution_function(kind: str) -> None:
    scale = math.exp(-1.5)
    edges = [(2 * k / 8 - 1 - 0.2) / scale for k in range(9)]
    edges[0], edges[-1] = -math.inf, math.inf
    expected = [KINDS[kind].cdf(high) - KINDS[kind].cdf(low) for low, high in pairwise(edges)]
    assert bins(kind, 3, 0.2, -1.5, torch.float64).exp().tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_far_from_the_mean_a_bin_has_a_finite_gradient(kind: str) -> None:
    mean = torch.full((1, 1, 1, 1), 1.0, requires_grad=True)
    log_scale = torch.tensor([-6.0], requires_grad=True)
    log_bins(kind, torch.full((1, 1, 1, 1), 3, dtype=torch.uint8), 8, mean, log_scale).sum().backward()
    for gradient in (mean.grad, log_scale.grad):
        assert gradient is not None
        assert torch.isfinite(gradient).all()
        assert float(gradient.abs().sum()) > 0


@pytest.mark.parametrize(("kind", "peer"), [*KINDS.items(), ("laplace", stats.laplace)])
def test_densities_are_scipys_and_channels_have_their_own_scale(kind: str, peer: Callable[..., None]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, mean = torch.rand((2, 2, 3, 2, 2), generator=generator, dtype=torch.float64)
    log_scale = torch.tensor([-1.0, 0.5, 0.0], dtype=torch.float64)
    expected = peer.logpdf(x.numpy(), mean.numpy(), log_scale.exp()[:, None, None].numpy()).reshape(2, -1).sum(axis=1)
    assert log_density(kind, x, mean, log_scale).tolist() == pytest.approx(expected.tolist())
