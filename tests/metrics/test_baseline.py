"""The pixel Gaussian: likelihood and samples of a known distribution."""

import math

import torch

from tarflow_scale.flows.likelihood import bits_per_dim
from tarflow_scale.metrics.baseline import PixelGaussian
from tarflow_scale.metrics.frechet import Moments


def test_likelihood_is_that_of_the_multivariate_normal() -> None:
    torch.manual_seed(0)
    levels = torch.randint(0, 16, (500, 6)).double()
    gaussian = PixelGaussian(Moments.of(levels), bit_depth=4)
    covariance = torch.cov(levels.T) + torch.eye(6) / 12
    normal = torch.distributions.MultivariateNormal(levels.mean(0) + 0.5, covariance)
    dequantised = levels[:20] + torch.rand(20, 6)
    x = (dequantised / 8 - 1).reshape(20, 1, 2, 3)
    expected = normal.log_prob(dequantised)  # nats a unit of level; in bits this is bits/dim as it is
    assert (gaussian.log_prob(x) - (expected + 6 * math.log(8))).abs().max() < 1e-10
    assert (bits_per_dim(gaussian.log_prob(x), 6, 4) + expected / (6 * math.log(2))).abs().max() < 1e-10


def test_samples_are_levels_with_the_right_moments() -> None:
    torch.manual_seed(0)
    levels = torch.randn(4000, 3, dtype=torch.float64) @ torch.tensor([[1.0, 0.5, 0], [0, 1, 0.5], [0, 0, 1]]).double()
    levels = (8 + 1.5 * levels).floor().clamp(0, 15)
    gaussian = PixelGaussian(Moments.of(levels), bit_depth=4)
    samples = gaussian.sample_levels(4000, seed=0)
    assert (samples == samples.floor()).all()
    assert samples.min() >= 0
    assert samples.max() <= 15
    assert (samples.mean(0) - levels.mean(0)).abs().max() < 0.15
    assert (torch.cov(samples.T) - torch.cov(levels.T)).abs().max() < 0.4
    assert torch.equal(samples[:10], gaussian.sample_levels(10, seed=0))
