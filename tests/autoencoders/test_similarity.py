"""PSNR and SSIM against their definitions, computed with SciPy."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from tarflow_scale.autoencoders.similarity import psnr, ssim


def images(seed: int, spread: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return spread * (2 * torch.rand(3, 2, 17, 24, generator=generator, dtype=torch.float64) - 1)


def expected_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al., equation 13, in levels 0..255; a Gaussian window of 11 x 11, only where it lies inside."""

    def blurred(x: np.ndarray) -> np.ndarray:
        return gaussian_filter(x, 1.5, radius=5)[5:-5, 5:-5]

    values = []
    for x, y in zip(127.5 * (a + 1), 127.5 * (b + 1), strict=True):
        mx, my = blurred(x), blurred(y)
        vx, vy, cov = blurred(x * x) - mx**2, blurred(y * y) - my**2, blurred(x * y) - mx * my
        c1, c2 = 2.55**2, 7.65**2
        values.append(((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean())
    return float(np.mean(values))


@pytest.mark.parametrize("noise", [0.02, 0.5])
def test_similarities_are_those_of_the_definitions(noise: float) -> None:
    x = images(0, 0.9)
    decoded = (x + noise * images(1)).clamp(-1, 1)
    for a, b, structure, decibels in zip(x, decoded, ssim(x, decoded), psnr(x, decoded), strict=True):
        assert float(structure) == pytest.approx(expected_ssim(a.numpy(), b.numpy()), abs=1e-9)
        error = np.mean((127.5 * (a - b).numpy()) ** 2)
        assert float(decibels) == pytest.approx(10 * np.log10(255**2 / error), abs=1e-9)


def test_limits() -> None:
    x = images(0)
    assert torch.allclose(ssim(x, x), torch.ones(3, dtype=torch.float64))
    assert torch.allclose(psnr(x, x), torch.full((3,), 10 * np.log10(4e10), dtype=torch.float64))
    wide = torch.where(x > 0.5, 3.0, x)  # values beyond 1 are clipped
    assert torch.equal(psnr(x, wide), psnr(x, wide.clamp(-1, 1)))
    assert torch.equal(ssim(x, wide), ssim(x, wide.clamp(-1, 1)))
