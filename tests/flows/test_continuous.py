"""The continuous flow: its trace, its gradients, its bookkeeping, and how it fails."""

from typing import Any

import pytest
import torch

from tarflow_scale.errors import NumericsError
from tarflow_scale.flows import continuous, standard_normal_log_prob
from tarflow_scale.flows.continuous import Continuous
from tests.flows.catalogue import moved


def flow(shape: tuple[int, ...] = (4,), **settings: Any) -> Continuous:
    torch.manual_seed(0)
    base: dict[str, Any] = {"width": 8, "hidden_layers": 2, "tolerance": 1e-9}
    made = Continuous(shape, None, **(base | settings)).double()
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


@pytest.mark.parametrize("gradients", ["adjoint", "direct"])
def test_a_gradient_that_is_not_finite_reaches_the_parameters_and_no_solver(gradients: str) -> None:
    """As of a step that is rejected; a solver would not come to an end."""
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
    with pytest.raises(NumericsError, match="more than model.max_evaluations=39 evaluations"):
        flow(solver="rk4", num_steps=10, max_evaluations=39).train()(x)


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
    with pytest.raises(ValueError, match=r"model.exact_trace_dims=15 dimensions \(got 16\); raise it"):
        made.nats_of_values(torch.zeros(1, 1, 4, 4, dtype=torch.float64))
