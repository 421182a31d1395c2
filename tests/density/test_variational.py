"""Variational inference, compared with known posteriors."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
import zuko
from torch import Tensor

from tarflow_scale.config.model import ContinuousConfig, IAFConfig, NICEConfig
from tarflow_scale.density import Posterior, fit_posterior
from tarflow_scale.density.variational import pareto_shape
from tarflow_scale.errors import NumericsError
from tarflow_scale.flows import Flow, build

DIMS = 3


class LinearRegression:
    """y = A x + noise with x ~ N(0, I): the posterior is Gaussian, and the evidence is known."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.a = torch.randn(8, DIMS, generator=generator)
        self.noise = 0.7
        self.y = self.a @ torch.tensor([1.0, -2.0, 0.5]) + self.noise * torch.randn(8, generator=generator)
        self.covariance = torch.linalg.inv(torch.eye(DIMS) + self.a.T @ self.a / self.noise**2)
        self.mean = self.covariance @ self.a.T @ self.y / self.noise**2
        marginal = self.noise**2 * torch.eye(8) + self.a @ self.a.T
        self.log_evidence = float(torch.distributions.MultivariateNormal(torch.zeros(8), marginal).log_prob(self.y))

    def log_joint(self, x: Tensor) -> Tensor:
        prior = torch.distributions.Normal(0.0, 1.0).log_prob(x).sum(dim=1)
        return prior + torch.distributions.Normal(x @ self.a.T, self.noise).log_prob(self.y).sum(dim=1)


def iaf() -> Flow:
    torch.manual_seed(0)
    return build(IAFConfig(transforms=3, hidden_widths=(32, 32), class_conditional=False), (DIMS,))


def test_the_posterior_of_a_conjugate_model_is_recovered() -> None:
    model = LinearRegression()
    posterior = fit_posterior(model.log_joint, iaf(), num_steps=1200)
    report = posterior.diagnostics(20_000)
    kl = model.log_evidence - report.elbo
    assert -3 * report.elbo_standard_error < kl <= 0.01
    assert report.elbo <= report.importance_bound
    assert abs(report.importance_bound - model.log_evidence) < 0.01
    assert report.effective_sample_size > 0.9 * report.num_samples
    assert report.pareto_k < 0.7
    draws = posterior.sample(20_000)
    assert (draws.mean(dim=0) - model.mean).abs().max() < 0.02
    assert (torch.cov(draws.T) - model.covariance).abs().max() < 0.02
    x, weights = posterior.weighted(20_000)
    assert float(weights.sum()) == pytest.approx(1)
    assert ((weights[:, None] * x).sum(dim=0) - model.mean).abs().max() < 0.01
    assert posterior.losses[-1] < posterior.losses[0]


def test_a_poor_fit_is_below_the_evidence_and_its_importance_bound_is_tighter() -> None:
    model = LinearRegression()
    torch.manual_seed(0)
    poor = build(NICEConfig(couplings=2, width=8, hidden_layers=1, class_conditional=False), (DIMS,))
    report = fit_posterior(model.log_joint, poor, num_steps=40).diagnostics(5000)
    assert report.elbo + 3 * report.elbo_standard_error < model.log_evidence
    assert report.elbo < report.importance_bound
    assert report.pareto_k > 0.5
    assert report.effective_sample_size < 0.5 * report.num_samples


CURVATURE, DEVIATION = 0.5, 1.5


def banana(x: Tensor) -> Tensor:
    """x1 ~ N(0, 1.5^2), x2 | x1 ~ N(x1^2 / 2, 0.5^2)."""
    first = torch.distributions.Normal(0.0, DEVIATION).log_prob(x[:, 0])
    return first + torch.distributions.Normal(CURVATURE * x[:, 0] ** 2, 0.5).log_prob(x[:, 1])


MEAN, VARIANCE = CURVATURE * DEVIATION**2, 2 * CURVATURE**2 * DEVIATION**4 + 0.5**2
"""Of x2."""


def check_weighted_moments(posterior: Posterior, rel: float) -> None:
    """Weighted moments have only a sampling error, which is large where the square of x1 is large."""
    x, weights = posterior.weighted(200_000)
    mean = (weights[:, None] * x).sum(dim=0)
    assert float(mean[1]) == pytest.approx(MEAN, rel=rel)
    assert float((weights * (x[:, 1] - mean[1]) ** 2).sum()) == pytest.approx(VARIANCE, rel=rel)
    report = posterior.diagnostics(50_000)
    assert -3 * report.elbo_standard_error < -report.elbo < 0.01  # its evidence is 1
    assert report.effective_sample_size > 0.95 * report.num_samples


@pytest.mark.slow
def test_moments_of_a_banana() -> None:
    torch.manual_seed(0)
    flow = build(IAFConfig(transforms=3, hidden_widths=(128, 128), class_conditional=False), (2,))
    posterior = fit_posterior(banana, flow, num_steps=3000, num_samples=512, peak_lr=3e-3)
    x = posterior.sample(200_000)
    assert abs(float(x[:, 0].mean())) < 0.02 * DEVIATION
    assert float(x[:, 0].std()) == pytest.approx(DEVIATION, rel=0.02)
    assert float(x[:, 1].mean()) == pytest.approx(MEAN, rel=0.02)
    assert float(x[:, 1].std()) == pytest.approx(math.sqrt(VARIANCE), rel=0.02)
    check_weighted_moments(posterior, 0.02)


@pytest.mark.slow
def test_a_flow_of_zukos_fits_as_well() -> None:
    torch.manual_seed(0)
    flow = zuko.flows.MAF(2, transforms=2, hidden_features=(64, 64))
    posterior = fit_posterior(banana, zuko.flows.Flow(flow.transform.inv, flow.base), num_samples=256)
    check_weighted_moments(posterior, 0.05)


@pytest.mark.parametrize("k", [0.1, 0.5, 0.9])
def test_the_shape_of_a_pareto_tail(k: float) -> None:
    found = [
        pareto_shape(torch.from_numpy(scipy.stats.genpareto.rvs(k, size=1000, random_state=seed))) for seed in range(20)
    ]
    assert float(np.mean(found)) == pytest.approx(k, abs=0.03)
    assert math.isinf(pareto_shape(torch.tensor([0.0] * 9 + [1.0])))
    assert math.isnan(pareto_shape(torch.zeros(9)))


def test_the_same_seed_gives_the_same_fit() -> None:
    model = LinearRegression()
    first, second = (fit_posterior(model.log_joint, iaf(), num_steps=5).losses for _ in range(2))
    assert first == second
    assert fit_posterior(model.log_joint, iaf(), num_steps=5, seed=1).losses != first
    found = []
    for number in range(2):
        torch.manual_seed(0)
        flow = build(ContinuousConfig(width=4, hidden_layers=1, tolerance=1e-2, class_conditional=False), (DIMS,))
        torch.rand(number)  # probes must not depend on what was drawn before
        found.append(fit_posterior(model.log_joint, flow, num_steps=3, num_samples=8).losses)
    assert found[0] == found[1]


def test_densities_that_are_wrong_end_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"one number per sample, in shape \(128,\) \(got shape \(128, 3\)\)"):
        fit_posterior(lambda x: -x.square(), iaf(), num_steps=1)
    with pytest.raises(
        NumericsError, match=r"not finite in 11 consecutive steps \(the last was step 10\); check log_joint"
    ):
        fit_posterior(lambda x: torch.log(-x.square().sum(dim=1)), iaf(), num_steps=50)
    posterior = fit_posterior(LinearRegression().log_joint, iaf(), num_steps=1)
    posterior._log_joint = lambda x: torch.log(x[:, 0])
    for look in (posterior.diagnostics, posterior.weighted):
        with pytest.raises(NumericsError, match=r"\d+ of 100 importance weights are NaN or infinite"):
            look(100)
    posterior._log_joint = lambda x: torch.full((len(x),), math.inf)
    with pytest.raises(NumericsError, match="100 of 100 importance weights are NaN or infinite"):
        posterior.diagnostics(100)
    posterior._log_joint = lambda x: torch.full((len(x),), -math.inf)
    with pytest.raises(NumericsError, match="log_joint is minus infinity for all 100 draws"):
        posterior.diagnostics(100)
