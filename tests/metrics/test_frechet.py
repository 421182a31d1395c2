"""Fréchet distance: closed forms, exact merging, and torch-fidelity's own numbers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from tarflow_scale.metrics.frechet import Moments, frechet_distance, merged
from tarflow_scale.metrics.parts import write_arrays


def features(num: int, dims: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dims, dims, dtype=torch.float64, generator=generator)
    return torch.randn(num, dims, dtype=torch.float64, generator=generator) @ mix + seed


def test_moments_are_numpys(tmp_path: Path) -> None:
    x = features(50, 6, 1)
    moments = Moments.of(x)
    assert np.allclose(moments.mean, x.numpy().mean(0), rtol=1e-13)
    assert np.allclose(moments.covariance, np.cov(x.numpy(), rowvar=False), rtol=1e-12)
    location = str(tmp_path / "moments.npz")
    write_arrays(location, moments.to_arrays("pool") | moments.to_arrays("other"))
    again = Moments.stored(location, "pool")
    assert again.num == 50
    assert (again.m2 == moments.m2).all()
    rest = moments.without(Moments.of(x[10:30]))
    expected = Moments.of(torch.cat([x[:10], x[30:]]))
    assert rest.num == 30
    assert np.allclose(rest.mean, expected.mean, rtol=1e-12)
    assert np.allclose(rest.m2, expected.m2, rtol=1e-10)


@pytest.mark.parametrize("sizes", [(100,), (1, 99), (50, 50), (7, 13, 80), (10,) * 10])
def test_any_division_merges_to_the_same_moments(sizes: tuple[int, ...]) -> None:
    x = features(100, 8, 2) + 1000  # a large mean, which naive sums would not survive
    whole = Moments.of(x)
    parts = x.split(list(sizes))
    found = merged(Moments.of(part) for part in parts)
    assert found.num == 100
    assert np.allclose(found.mean, whole.mean, rtol=1e-14)
    assert np.allclose(found.m2, whole.m2, rtol=1e-10)


def test_distance_of_two_known_gaussians() -> None:
    def moments(mean: list[float], variances: list[float]) -> Moments:
        return Moments(101, np.array(mean), np.diag(np.array(variances)) * 100)

    a, b = moments([0, 0], [1, 4]), moments([3, 4], [9, 16])
    expected = 25 + (1 - 3) ** 2 + (2 - 4) ** 2  # |dm|^2 + sum (s1 - s2)^2
    assert frechet_distance(a, b) == pytest.approx(expected, abs=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_it_is_torch_fidelitys_distance() -> None:
    x, y = features(200, 5, 3), features(300, 5, 4)
    statistics = [fid_features_to_statistics(part) for part in (x, y)]
    expected = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    parts = x.split(37)
    assert frechet_distance(merged(map(Moments.of, parts)), Moments.of(y)) == pytest.approx(expected, rel=1e-9)
