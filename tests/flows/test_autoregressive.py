"""MAF and IAF: dependence of dimensions on each other, and equality with zuko."""

import pytest
import torch
import zuko

from tarflow_scale.config.model import IAFConfig, MAFConfig
from tarflow_scale.flows.autoregressive import Autoregressive
from tests.flows.catalogue import moved


def flow(
    inverse: bool, transforms: int = 1, num_classes: int | None = None, widths: tuple[int, ...] = (64, 48)
) -> Autoregressive:
    torch.manual_seed(0)
    config = (IAFConfig if inverse else MAFConfig)(transforms=transforms, hidden_widths=widths)
    made = Autoregressive((5,), num_classes, config).double()
    moved(made, ("",))
    return made


def jacobians_of(made: Autoregressive) -> torch.Tensor:
    """Largest absolute value of each entry of the Jacobian over 20 points; a unit may be inactive at one point."""
    found = [
        torch.autograd.functional.jacobian(lambda v: made(v[None])[0][0], x).abs()
        for x in torch.randn(20, 5, dtype=torch.float64)
    ]
    return torch.stack(found).amax(dim=0)


@pytest.mark.parametrize("inverse", [False, True])
def test_a_dimension_sees_those_before_it_exactly(inverse: bool) -> None:
    seen = jacobians_of(flow(inverse))
    assert (seen.triu(1) == 0).all()  # not close to: exactly
    assert (seen.tril() != 0).sum() == 15
    assert (jacobians_of(flow(inverse, transforms=2)) != 0).all()  # the second goes the other way


def test_it_is_zukos_density() -> None:
    made = flow(False, transforms=3)
    theirs = zuko.flows.MAF(5, 0, transforms=3, hidden_features=(64, 48)).double()
    theirs.transform.transforms.load_state_dict(made.transforms.state_dict())
    x = torch.randn(7, 5, dtype=torch.float64)
    assert torch.allclose(made.log_prob(x), theirs().log_prob(x), atol=1e-12, rtol=0)


def test_an_iaf_is_a_maf_the_other_way_round() -> None:
    maf, iaf = flow(False, 2, 3), flow(True, 2, 3)
    iaf.load_state_dict(maf.state_dict())
    x, y = torch.randn(4, 5, dtype=torch.float64), torch.tensor([0, -1, 2, 1])
    z, log_det = maf(x, y)
    assert torch.allclose(iaf.inverse(x, y), z, atol=1e-12)
    back, back_log_det = iaf(z, y)
    assert torch.allclose(back, x, atol=1e-10)
    assert torch.allclose(back_log_det, -log_det, atol=1e-10)


def test_gradients_pass_through_samples_of_an_iaf() -> None:
    """Compared with finite differences, in one weight, of a summand of the ELBO."""
    made = flow(True, 2)
    weight = made.transforms[0].hyper[-1].bias

    def bound() -> torch.Tensor:
        x, log_prob = made.rsample_and_log_prob(4, generator=torch.Generator().manual_seed(0))
        return (x.square().sum(dim=1) + log_prob).mean()

    bound().backward()
    expected = weight.grad.clone()
    assert expected.abs().max() > 1e-3
    for place in range(len(weight)):
        with torch.no_grad():
            ends = []
            for step in (1e-6, -2e-6):
                weight[place] += step
                ends.append(float(bound()))
            weight[place] += 1e-6
        assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(float(expected[place]), abs=1e-7)


def test_networks_that_would_leave_dimensions_unread_are_refused() -> None:
    with pytest.raises(ValueError, match=r"hidden_widths must be at least 19 for 20 dimensions.*\(got \[64, 18\]\)"):
        Autoregressive((20,), None, MAFConfig(hidden_widths=(64, 18)))
    with pytest.raises(ValueError, match="must be at least 20 for 20 dimensions"):
        Autoregressive((20,), 3, MAFConfig(hidden_widths=(19,)))
    assert (jacobians_of(flow(False, widths=(20, 20))) != 0).sum() >= 14


def test_far_out_an_iaf_of_logits_keeps_its_density() -> None:
    made = Autoregressive((2,), None, IAFConfig(transforms=1, hidden_widths=(8,), logit_alpha=1e-6))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
        z = torch.tensor([[17.0, -17.0]])
        found = made.inverse_and_log_det(z)[1]
        exact = made.double().inverse_and_log_det(z.double())[1]
    assert float(found) == pytest.approx(float(exact), rel=1e-5)


def test_one_dimension_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at least 2 dimensions \(got 1\)"):
        Autoregressive((1,), None, MAFConfig())


def test_surprise_of_a_dimension_is_that_of_its_conditional_density() -> None:
    """For one transformation, ``-log p(x_i | x_1 .. x_(i-1))`` ignores later dimensions; its density sums to one."""
    made = flow(False)
    x = torch.randn(5, dtype=torch.float64)
    grid = torch.linspace(-40, 40, 20_001, dtype=torch.float64)
    for i in range(5):
        points = x.repeat(len(grid), 1)
        points[:, i] = grid
        nats = made.nats_of_values(points)
        assert float(torch.trapezoid((-nats[:, i]).exp(), grid)) == pytest.approx(1, abs=1e-9)
        assert torch.allclose(nats[:, :i], nats[:1, :i].expand(-1, i), rtol=0, atol=1e-12)


@pytest.mark.parametrize("inverse", [False, True])
def test_log_determinants_of_dimensions_are_those_of_a_diagonal(inverse: bool) -> None:
    """For one transformation, whose Jacobian is triangular."""
    made, x = flow(inverse, num_classes=3), torch.randn(1, 5, dtype=torch.float64)
    y = torch.tensor([1])
    z, log_dets = made.encode_values(x, y)
    jacobian = torch.autograd.functional.jacobian(lambda v: made(v, y)[0][0], x)[:, 0]
    assert torch.allclose(log_dets[0], jacobian.diagonal().log(), atol=1e-10)
    assert torch.allclose(z, made(x, y)[0], atol=1e-12)
