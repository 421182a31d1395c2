"""The Gaussian rule of guidance is the product of powers of two densities, computed on a grid."""

import math

import pytest
import torch

from tarflow_scale.config.sampling import Guidance
from tarflow_scale.errors import ConfigError
from tarflow_scale.flows.guidance import guided

GRID = torch.linspace(-12, 12, 20_001, dtype=torch.float64)


def moments(log_density: torch.Tensor) -> tuple[float, float]:
    weights = torch.softmax(log_density, dim=0)
    mean = float((weights * GRID).sum())
    return mean, math.sqrt(float((weights * (GRID - mean) ** 2).sum()))


@pytest.mark.parametrize("scale", [0.3, 2.0])
@pytest.mark.parametrize(("mean", "std", "weak_mean", "weak_std"), [(0.5, 0.4, -0.2, 1.1), (1.0, 0.8, 0.9, 0.8)])
def test_it_is_a_product_of_powers(scale: float, mean: float, std: float, weak_mean: float, weak_std: float) -> None:
    strong, weak = (-0.5 * ((GRID - m) / s) ** 2 - math.log(s) for m, s in ((mean, std), (weak_mean, weak_std)))
    expected = moments((1 + scale) * strong - scale * weak)
    values = [
        torch.tensor(value, dtype=torch.float64) for value in (math.log(std), mean, math.log(weak_std), weak_mean)
    ]
    log_std, moved = guided(*values, scale, Guidance(scale=scale, rule="gaussian"))
    assert log_std is not None
    assert (float(moved), float(log_std.exp())) == pytest.approx(expected, abs=1e-9)


def test_a_wider_prediction_counts_as_one_of_equal_width() -> None:
    """Otherwise the product could have no finite integral."""
    values = [torch.tensor(value) for value in (1.0, 0.5, -1.0, 0.1)]
    log_std, mean = guided(*values, 3.0, Guidance(scale=3.0, rule="gaussian"))
    assert log_std is not None
    assert float(log_std) == pytest.approx(1.0)
    assert float(mean) == pytest.approx(4 * 0.5 - 3 * 0.1)


def test_the_gaussian_rule_has_no_parts() -> None:
    with pytest.raises(ConfigError, match=r"rule=gaussian changes log-scales and means together \(got what=mean\)"):
        Guidance(scale=1.0, rule="gaussian", what="mean")
