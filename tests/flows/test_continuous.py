"""The continuous flow: its trace, gradients, counts of evaluations, and errors."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from tarflow_scale.config.model import ContinuousConfig
from tarflow_scale.errors import NumericsError
from tarflow_scale.flows import continuous, standard_normal_log_prob
from tarflow_scale.flows.continuous import Continuous
from tests.flows.catalogue import moved


def flow(shape: tuple[int, ...] = (4,), **settings: Any) -> Continuous:
    torch.manual_seed(0)
    base: dict[str, Any] = {"width": 8, "hidden_layers": 2, "tolerance": 1e-9}
    made = Continuous(shape, None, ContinuousConfig(**(base | settings))).double()
    moved(made, ())
    return made.eval()


def test_hutchinsons_estimate_is_unbiased() -> None:
    made, x = flow(tolerance=1e-6), torch.randn(1, 4, dtype=torch.float64)
    with torch.no_grad():
        exact = float(made(x)[1])
        made.train()
        torch.manual_seed(1)
        found = torch.cat([made(x.expand(50, -1))[1] for _ in range(4)])
    assert found.std() > 1e-3  # it is an estimate
    assert abs(float(found.mean()) - exact) < 3 * float(found.std()) / len(found) ** 0.5


def test_a_probe_is_kept_for_a_whole_solve_and_in_evaluation_the_sample_decides_it() -> None:
    made = flow((1, 3, 3), exact_trace_dims=0, tolerance=1e-6)
    x = torch.randn(3, 1, 3, 3, dtype=torch.float64)
    with torch.no_grad():
        together, again = made(x)[1], made(x)[1]
        alone = torch.cat([made(one[None])[1] for one in x])
    assert torch.equal(together, again)
    assert torch.allclose(together, alone, atol=1e-4)
    of_each = made._probe(x)
    assert of_each is not None
    assert not torch.equal(of_each[0], of_each[1])
    assert torch.equal(made._probe(x[1:2])[0], of_each[1])  # type: ignore[index]
    torch.manual_seed(3)
    probe = made.train()._probe(x)
    assert probe is not None
    assert set(probe.unique().tolist()) == {-1.0, 1.0}
    assert not torch.equal(probe[0], probe[1])


@pytest.mark.parametrize("solver", ["dopri5", "rk4"])
def test_the_adjoint_has_the_gradients_of_the_solver_itself(solver: str) -> None:
    found = []
    x = torch.randn(5, 4, dtype=torch.float64)
    for gradients in ("adjoint", "direct"):
        made = flow(solver=solver, gradients=gradients, num_steps=60).train()
        torch.manual_seed(5)  # the same probe
        z, log_det = made(x.requires_grad_())
        loss = -(standard_normal_log_prob(z) + log_det).mean()
        wanted = (x, *made.parameters())
        found.append(torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True))
    for adjoint, direct in zip(*found, strict=True):
        assert (adjoint - direct).abs().max() < 1e-5
    assert max(float(one.abs().max()) for one in found[0]) > 1e-2


@pytest.mark.slow
def test_in_evaluation_the_trace_is_that_of_the_exact_jacobian_whatever_training_solves_with() -> None:
    x = torch.randn(2, 4, dtype=torch.float64)
    for solver in ("dopri5", "bosh3", "rk4", "midpoint"):
        made = flow(solver=solver, num_steps=2, tolerance=1e-9, max_evaluations=100_000)
        with torch.no_grad():
            assert (made.inverse(made(x)[0]) - x).abs().max() < 1e-5
        log_det = made(x)[1]
        for i in range(2):
            jacobian = torch.autograd.functional.jacobian(lambda v, f=made: f(v[None])[0][0], x[i])
            assert abs(float(log_det[i].detach()) - float(torch.linalg.slogdet(jacobian).logabsdet)) < 1e-5, solver


TIGHT = 1e-11
Errors = dict[str, float]


def errors_of(shape: tuple[int, ...], dtype: torch.dtype, gradients: str, size: float = 1.0) -> tuple[Errors, Errors]:
    """Largest differences at a tolerance of 1e-5 from a tight solver in fp64, and evaluations in each direction."""

    def solved(made: Continuous, x: torch.Tensor) -> list[torch.Tensor]:
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.mul_(size)
        x = x.requires_grad_()
        log_prob = made.log_prob(x)
        found = torch.autograd.grad(log_prob.sum(), (x, *made.parameters()), allow_unused=True)
        return [log_prob.detach(), torch.cat([one.flatten() for one in found if one is not None])]

    x = torch.randn(8, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = solved(flow(shape, tolerance=TIGHT, gradients="direct"), x.clone())
    made = flow(shape, tolerance=1e-5, gradients=gradients).to(dtype)
    log_prob, slopes = solved(made, x.to(dtype))
    counts = made.diagnostics()
    with torch.no_grad():
        back = made.inverse(made(x.to(dtype))[0])
    return {
        "log_prob": float((log_prob - exact[0]).abs().max()),
        "gradient": float((slopes - exact[1]).abs().max() / exact[1].abs().max()),
        "inverse": float((back - x).abs().max()),
    }, counts


@pytest.mark.parametrize("gradients", ["adjoint", "direct"])
@pytest.mark.parametrize("shape", [(4,), (1, 4, 4), (1, 8, 8)])
def test_at_a_tolerance_of_1e_5_it_is_as_exact_as_its_page_says(shape: tuple[int, ...], gradients: str) -> None:
    """torchdiffeq's default last step goes past the end, which gave errors of 1e-4 to 3e-4 in all cases."""
    errors, _ = errors_of(shape, torch.float64, gradients)
    assert errors["log_prob"] < 2e-5
    assert errors["inverse"] < 5e-6
    assert errors["gradient"] < 6e-6
    errors, _ = errors_of(shape, torch.float32, gradients)
    assert errors["log_prob"] < 1e-4
    assert errors["inverse"] < 3e-5


def test_smooth_dynamics_take_one_step_in_each_direction() -> None:
    _, counts = errors_of((1, 4, 4), torch.float64, "adjoint")
    assert counts == {"forward_evaluations": 7.0, "backward_evaluations": 7.0}


def test_where_dynamics_stretch_errors_grow_as_its_page_says() -> None:
    errors, counts = errors_of((1, 4, 4), torch.float64, "adjoint", size=2.0)
    assert counts["forward_evaluations"] > 7
    assert errors["log_prob"] < 3e-3
    assert errors["inverse"] < 1e-3


@pytest.mark.parametrize("solver", ["dopri5", "bosh3"])
def test_gradients_through_samples_are_those_of_a_tight_solver(solver: str) -> None:
    """The adjoint of a solve that runs backwards in time ends at the time where the solve began."""
    z = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = []
    for settings in ({"tolerance": TIGHT, "gradients": "direct"}, {"tolerance": 1e-6, "solver": solver}):
        made = flow(**settings)
        at = z.clone().requires_grad_()
        found.append(torch.autograd.grad(made.inverse(at).square().sum(), (at, *made.dynamics.layers.parameters())))
    for exact, one in zip(*found, strict=True):
        assert (one - exact).abs().max() < 1e-4


def test_second_derivatives_need_the_solvers_own_operations() -> None:
    made, x = flow(tolerance=1e-8), torch.randn(1, 4, dtype=torch.float64).requires_grad_()

    def score(at: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(made.log_prob(at).sum(), at, create_graph=True)[0]

    with pytest.raises(ValueError, match=r"^gradients=adjoint cannot .*\); set flow.gradients = 'direct'"):
        score(x)
    made.gradients = "direct"
    direction = torch.randn_like(x)
    (found,) = torch.autograd.grad((score(x) * direction).sum(), x)
    step = 1e-4
    ends = [score((x + side * step * direction).detach().requires_grad_()) for side in (1, -1)]
    expected = ((ends[0] - ends[1]) / (2 * step)).detach()
    assert (found - expected).abs().max() < 1e-5
    assert expected.abs().max() > 1e-2


def test_threads_that_share_a_flow_count_their_own_evaluations() -> None:
    made, x = flow(tolerance=1e-5, max_evaluations=7), torch.randn(16, 4, dtype=torch.float64)
    expected = made.log_prob(x).detach()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: made.log_prob(x).detach(), range(64)))
    assert all(torch.equal(one, expected) for one in found)


@pytest.mark.parametrize("gradients", ["adjoint", "direct"])
def test_a_gradient_that_is_not_finite_reaches_the_parameters_and_no_solver(gradients: str) -> None:
    """Such a step is rejected; an adjoint solve would not end."""
    made = flow(gradients=gradients, tolerance=1e-6)
    z, log_det = made(torch.randn(2, 4, dtype=torch.float64))
    (torch.nan * (standard_normal_log_prob(z) + log_det)).sum().backward()
    assert all(bool(torch.isnan(p.grad).any()) for p in made.parameters() if p.grad is not None)
    assert sum(p.grad is not None for p in made.parameters()) >= len(made.dynamics.layers)


def test_evaluations_are_counted_and_limited() -> None:
    made, x = flow(solver="rk4", num_steps=10).train(), torch.randn(2, 4, dtype=torch.float64)
    z, log_det = made(x)
    assert made.diagnostics()["forward_evaluations"] == 40
    assert made.diagnostics()["backward_evaluations"] == 0
    (standard_normal_log_prob(z) + log_det).sum().backward()
    assert made.diagnostics()["backward_evaluations"] >= 40
    with pytest.raises(NumericsError, match="more than model.max_evaluations=20 evaluations"):
        flow(max_evaluations=20)(x)


def test_dynamics_that_are_stiff_end_in_one_line() -> None:
    made, x = flow(tolerance=1e-12), torch.randn(2, 4, dtype=torch.float64)
    with torch.no_grad():
        for parameter in made.dynamics.parameters():
            parameter.mul_(200.0)
        with pytest.raises(
            NumericsError, match=r"the solver of the continuous flow is stuck \(.*\); .*model.solver=rk4"
        ):
            made(x)


def test_a_backward_solve_that_is_stuck_ends_in_the_same_line() -> None:
    made, x = flow(), torch.randn(2, 4, dtype=torch.float64)
    z, log_det = made(x)
    for parameter in made.dynamics.parameters():
        parameter.data.mul_(200.0)  # behind autograd's back
    with pytest.raises(NumericsError, match="the solver of the continuous flow is stuck"):
        (standard_normal_log_prob(z) + log_det).sum().backward()


@pytest.mark.parametrize("hidden_layers", [1, 2, 3])
@pytest.mark.parametrize("shape", [(5,), (2, 5, 4), (1, 1, 2), (1, 9, 7)])
def test_the_diagonal_is_that_of_the_jacobian(
    shape: tuple[int, ...], hidden_layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = flow(shape, hidden_layers=hidden_layers).dynamics
    h, t = torch.randn(3, *shape, dtype=torch.float64), torch.tensor(0.3)
    velocity, diagonal = made.with_diagonal(t, h, None)
    assert torch.equal(velocity, made(t, h, None))
    for one, found in zip(h, diagonal, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda v: made(t, v[None], None)[0].flatten(), one)
        assert (jacobian.flatten(1).diagonal() - found.flatten()).abs().max() < 1e-12
    assert diagonal.abs().min() > 0
    monkeypatch.setattr(continuous, "_TANGENTS", {"cpu": 1})
    assert torch.allclose(made.with_diagonal(t, h, None)[1], diagonal, atol=1e-14)  # one probe after the other


def test_places_that_no_layer_connects_share_a_probe() -> None:
    for side, hidden_layers, num in ((8, 2, 16), (32, 2, 16), (3, 2, 9), (8, 3, 25)):
        made = flow((2, side, side), hidden_layers=hidden_layers).dynamics
        probes = made._probes(torch.zeros(()))
        assert len(probes) == 2 * num
        assert torch.equal(probes.sum(dim=0), torch.ones(2, side, side))


def test_log_determinants_of_values_are_a_division_of_the_same_solve() -> None:
    made, x = flow((1, 4, 4), tolerance=1e-5), torch.randn(3, 1, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        z, log_det = made(x)
        of_values, log_dets = made.encode_values(x, None)
    assert torch.equal(of_values.flatten(1), z)
    assert (log_dets.flatten(1).sum(dim=1) - log_det).abs().max() < 1e-12


def test_an_estimated_trace_divides_no_surprise() -> None:
    made = flow((1, 4, 4), exact_trace_dims=15)
    assert not made.divides_surprise
    with pytest.raises(
        ValueError, match=r"model.exact_trace_dims=15 dimensions \(got 16\); raise flow.exact_trace_dims"
    ):
        made.nats_of_values(torch.zeros(1, 1, 4, 4, dtype=torch.float64))
