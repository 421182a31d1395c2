"""The checks of the conformance suite; each raises AssertionError for a wrong flow or layer.

They are functions, so that `test_mutations` can show that they fail for broken models.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tarflow_scale.flows import Flow, standard_normal_log_prob
from tarflow_scale.flows.coupling import Layer

EXACT = 1e-10
LOG_DET = 1e-8
LOG_DETS_CANCEL = 1e-9


def jacobian_log_det(function: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """log|det| of the Jacobian of ``function``, which takes batches, at one sample ``x``, by autograd.

    Row i is the gradient of value i of copy i of the sample, so one backward pass gives all rows.
    """
    copies = x.expand(x.numel(), *x.shape).clone().requires_grad_()
    (jacobian,) = torch.autograd.grad(function(copies).flatten(1).diagonal().sum(), copies)
    return float(torch.linalg.slogdet(jacobian.flatten(1)).logabsdet)


def copies_of(y: Tensor | None, i: int, like: Tensor) -> Tensor | None:
    """Condition i for each sample of a batch."""
    return None if y is None else y[i : i + 1].expand(len(like), *y.shape[1:])


def check_flow_log_det(flow: Flow, x: Tensor, y: Tensor | None, tolerance: float = LOG_DET) -> None:
    """The log-determinant of each sample equals that of the Jacobian by autograd."""
    with torch.no_grad():
        _, log_det = flow(x, y)
    assert log_det.shape == (len(x),)
    for i in range(len(x)):
        expected = jacobian_log_det(lambda v, i=i: flow(v, copies_of(y, i, v))[0], x[i])
        assert abs(float(log_det[i]) - expected) < tolerance, (i, float(log_det[i]), expected)


@torch.no_grad()
def check_flow_inverse(flow: Flow, x: Tensor, y: Tensor | None, tolerance: float = EXACT) -> None:
    """Decoding inverts encoding, and encoding inverts decoding."""
    z, _ = flow(x, y)
    assert z.shape == (len(x), flow.num_dims)
    assert (flow.inverse(z, y) - x).abs().max() < tolerance
    z = torch.randn(z.shape, dtype=z.dtype, generator=torch.Generator().manual_seed(5))
    assert (flow(flow.inverse(z, y), y)[0] - z).abs().max() < 10 * tolerance


def check_sample_density(flow: Flow, z: Tensor, y: Tensor | None, tolerance: float = LOG_DET) -> None:
    """``log_prob`` of a sample is the base density of its latent over the volume change of the *inverse*."""
    with torch.no_grad():
        x = flow.inverse(z, y)
        log_prob = flow.log_prob(x, y)
    for i in range(len(z)):
        volume = jacobian_log_det(lambda v, i=i: flow.inverse(v, copies_of(y, i, v)), z[i])
        expected = float(standard_normal_log_prob(z[i : i + 1])) - volume
        assert abs(float(log_prob[i]) - expected) < tolerance


@torch.no_grad()
def check_density_integrates_to_one(flow: Flow) -> None:
    """The density integrates to one, by trapezoids in two dimensions, by 32,768 Sobol points in more.

    The sums of the flows of the catalogue are within 2e-4 of 1, most within 1e-5.
    """
    bound = None if flow.logit_alpha is None else 1 / (1 - 2 * flow.logit_alpha)
    if flow.num_dims == 2:
        end, points = (7.0, 141) if bound is None else (bound - 1e-9, 201)
        axis = torch.linspace(-end, end, points, dtype=torch.float64)
        grid = torch.cartesian_prod(axis, axis).reshape(-1, *flow.event_shape)
        total = sum(float(flow.log_prob(part).exp().sum()) for part in grid.split(100_000))
        total *= (2 * end / (points - 1)) ** 2
        assert abs(total - 1) < 1e-3, total
        return
    u = torch.quasirandom.SobolEngine(flow.num_dims, scramble=True, seed=0).draw(2**15, dtype=torch.float64)
    u = (2 * u - 1).clamp(-1 + 1e-12, 1 - 1e-12)
    if bound is None:
        x = math.sqrt(2) * torch.erfinv(u)
        proposal = standard_normal_log_prob(x)
    else:
        x = bound * u
        proposal = torch.full((len(x),), -flow.num_dims * math.log(2 * bound), dtype=torch.float64)
    total = float((flow.log_prob(x.reshape(-1, *flow.event_shape)) - proposal).exp().mean())
    assert abs(total - 1) < 1e-3, total


MOMENT_MATCHED = 8.254614
"""8-bit bits/dim of uniform pixels under the Gaussian of their mean and variance: 0.5 log2(2 pi e / 3) + 7."""
STANDARD_NORMAL = 8.566197
"""The same under N(0, 1): 0.5 log2(2 pi) + 1 / (6 ln 2) + 7."""


@torch.no_grad()
def check_uniform_pixels_cost(flow: Flow, expected_bits_per_dim: float) -> None:
    """Uniform pixels on [-1, 1], with every value equally often, cost what the closed form says."""
    grid = (torch.arange(40_000, dtype=torch.float64) + 0.5) / 20_000 - 1
    x = grid.reshape(-1, *flow.event_shape)
    bits = -flow.log_prob(x).mean() / (flow.num_dims * math.log(2)) + 7
    assert abs(float(bits) - expected_bits_per_dim) < 1e-6, float(bits)


def check_layer_log_det(layer: Layer, x: Tensor) -> None:
    """See `check_flow_log_det`; and the Jacobian of the inverse has the opposite log-determinant."""
    with torch.no_grad():
        y, log_det = layer(x)
    assert log_det.shape == (len(x),)
    assert y.shape == x.shape
    for i in range(len(x)):
        expected = jacobian_log_det(lambda v: layer(v)[0], x[i])
        assert abs(float(log_det[i]) - expected) < LOG_DET, (i, float(log_det[i]), expected)
        inverse = jacobian_log_det(layer.inverse, y[i])
        assert abs(float(log_det[i]) + inverse) < LOG_DETS_CANCEL


@torch.no_grad()
def check_layer_inverse(layer: Layer, x: Tensor) -> None:
    """Each direction inverts the other."""
    y, _ = layer(x)
    assert (layer.inverse(y) - x).abs().max() < EXACT
    assert (layer(layer.inverse(x))[0] - x).abs().max() < EXACT


@torch.no_grad()
def check_samples_are_independent(flow: Flow, x: Tensor, y: Tensor | None, tolerance: float = 1e-12) -> None:
    """The first sample does not change when the rest of the batch changes."""
    z, log_det = flow(x, y)
    other = torch.cat([x[:1], 0.5 * x[1:].flip(0)])
    z_other, log_det_other = flow(other, y)
    assert (z[1:] - z_other[1:]).abs().max() > 1e-3
    assert (z[0] - z_other[0]).abs().max() < tolerance
    assert abs(float(log_det[0] - log_det_other[0])) < tolerance
    back = flow.inverse(z, y)
    back_other = flow.inverse(torch.cat([z[:1], z_other[1:]]), y)
    assert (back[0] - back_other[0]).abs().max() < tolerance


def gradients(flow: Flow, x: Tensor, y: Tensor | None) -> dict[str, Tensor]:
    """Gradients of the mean log-likelihood per dimension, by parameter name, and of the images."""
    flow.zero_grad()
    x = x.clone().requires_grad_()
    z, log_det = flow(x, y)
    ((standard_normal_log_prob(z) + log_det).mean() / flow.num_dims).backward()
    found = {name: parameter.grad.clone() for name, parameter in flow.named_parameters() if parameter.grad is not None}
    assert x.grad is not None
    return found | {"images": x.grad}


def relative_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Norm of the difference of all gradients, divided by the norm of the expected gradients."""
    assert found.keys() == expected.keys()
    difference = sum(float((found[name] - expected[name]).square().sum()) for name in expected)
    return math.sqrt(difference / sum(float(value.square().sum()) for value in expected.values()))
