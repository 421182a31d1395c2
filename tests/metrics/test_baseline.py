"""The pixel Gaussian: likelihood and samples of a known distribution."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from tarflow_scale.config.prepare import PrepareConfig
from tarflow_scale.flows.likelihood import bits_per_dim
from tarflow_scale.metrics.baseline import PixelGaussian
from tarflow_scale.metrics.bits import gaussian_nats
from tarflow_scale.metrics.frechet import Moments
from tarflow_scale.shards.reader import ShardSet
from tarflow_scale.verbs.prepare.driver import run as prepare


def test_likelihood_is_that_of_the_multivariate_normal() -> None:
    torch.manual_seed(0)
    levels = torch.randint(0, 16, (500, 6)).double()
    gaussian = PixelGaussian(Moments.of(levels), bit_depth=4)
    covariance = torch.cov(levels.T) + torch.eye(6) / 12
    normal = torch.distributions.MultivariateNormal(levels.mean(0) + 0.5, covariance)
    dequantized = levels[:20] + torch.rand(20, 6)
    x = (dequantized / 8 - 1).reshape(20, 1, 2, 3)
    expected = normal.log_prob(dequantized)  # nats a unit of level; in bits this is bits/dim as it is
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


def vectors(path: Path, x: np.ndarray) -> ShardSet:
    np.savez(path.with_suffix(".npz"), x=x)
    source = {"kind": "vectors", "path": str(path.with_suffix(".npz"))}
    config = {"source": source, "split": {"test_fraction": 0}, "shards": {"path": str(path)}}
    prepare(PrepareConfig.model_validate(config), dry_run=False)
    return ShardSet(f"{path}/train")


def test_the_gaussian_of_vectors_is_scipys_and_has_no_units(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    mixed = rng.standard_normal((500, 3)) @ rng.standard_normal((3, 3)) * [1e-6, 1.0, 1e6]
    train, test = vectors(tmp_path / "a", mixed[:400]), vectors(tmp_path / "b", mixed[400:])
    x, held_out = mixed[:400].astype("f4").astype(float), mixed[400:].astype("f4").astype(float)
    scale = np.array([1e-6, 1.0, 1e6])
    expected = -multivariate_normal(x.mean(0) / scale, np.cov((x / scale).T)).logpdf(held_out / scale).mean()
    found = gaussian_nats(train, test)
    assert found == pytest.approx(expected + np.log(scale).sum(), rel=2e-3)


@pytest.mark.parametrize("case", ["few", "constant", "sum"])
def test_where_columns_depend_on_each_other_there_is_no_gaussian(tmp_path: Path, case: str) -> None:
    x = np.random.default_rng(0).standard_normal((20 if case == "few" else 200, 30))
    if case == "constant":
        x[:, 3] = 1.0
    if case == "sum":
        x[:, 3] = x[:, 0] + x[:, 1]
    shards = vectors(tmp_path / "a", x)
    assert gaussian_nats(shards, shards) is None
