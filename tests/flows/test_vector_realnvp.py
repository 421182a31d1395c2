"""RealNVP for vectors fulfils the contract of flows, and its scales are initialised from the data."""

import pytest
import torch
from torch import Tensor

from tarflow_scale.config.model import RealNVPConfig
from tarflow_scale.errors import ConfigError
from tarflow_scale.flows import Flow, build, load_flow, save_flow
from tests.flows.catalogue import moved


def flow_of(dims: int, classes: int | None = 3, **settings: object) -> Flow:
    config = {
        "kind": "realnvp",
        "levels": 1,
        "width": 8,
        "residual_blocks": 1,
        "class_conditional": classes is not None,
    }
    torch.manual_seed(0)
    flow = build(RealNVPConfig.model_validate(config | settings), (dims,), classes).double()
    moved(flow, ())
    return flow.eval()


def data(num: int, dims: int) -> Tensor:
    return torch.randn(num, dims, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dims", [2, 5])
def test_log_det_is_that_of_the_jacobian_and_the_inverse_is_exact(dims: int) -> None:
    flow = flow_of(dims)
    x, y = data(3, dims), torch.tensor([0, 2, -1])
    z, log_det = flow(x, y)
    assert float((flow.inverse(z, y) - x).detach().abs().max()) <= 1e-10
    for row in range(3):

        def one(value: Tensor, row: int = row) -> Tensor:
            return flow(value[None], y[row : row + 1])[0][0]

        jacobian = torch.autograd.functional.jacobian(one, x[row])
        assert abs(float(torch.linalg.slogdet(jacobian)[1] - log_det[row].detach())) <= 1e-8


def test_every_coupling_changes_one_half_alone() -> None:
    flow = flow_of(4, None)
    with torch.no_grad():
        for number, network in enumerate(flow.networks):  # type: ignore[arg-type]
            if number:
                for parameter in network.parameters():
                    parameter.zero_()
        flow.bias.zero_()  # type: ignore[operator]
        flow.log_scale.zero_()  # type: ignore[operator]
        x = data(5, 4)
        z, _ = flow(x)
    assert torch.equal(z[:, 0::2], x[:, 0::2])
    assert not torch.isclose(z[:, 1::2], x[:, 1::2]).any()


@torch.no_grad()
def test_its_density_integrates_to_one() -> None:
    flow = flow_of(2, None, log_scale_bound=0.5)
    steps = torch.linspace(-12, 12, 801, dtype=torch.float64)
    grid = torch.cartesian_prod(steps, steps)
    total = sum(float(flow.log_prob(few).exp().sum()) for few in grid.split(2**17))
    assert abs(total * float(steps[1] - steps[0]) ** 2 - 1) < 1e-3


def test_parts_of_the_surprise_are_exact() -> None:
    flow = flow_of(5)
    x, y = data(4, 5), torch.tensor([0, 1, 2, -1])
    assert torch.allclose(flow.nats_of_values(x, y).sum(dim=1), -flow.log_prob(x, y), atol=1e-10)


def test_it_starts_from_the_units_of_the_data() -> None:
    config = RealNVPConfig(levels=1, width=4, class_conditional=False)
    flow = build(config, (3,)).double()
    x = data(400, 3) * torch.tensor([1e3, 1e-3, 1.0], dtype=torch.float64) + 50
    flow.initialize(x)
    z, _ = flow(x)
    assert torch.allclose(z.mean(dim=0), torch.zeros(3, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(z.std(dim=0), torch.ones(3, dtype=torch.float64), atol=5e-3)


def test_a_number_that_does_not_vary_yet_keeps_its_scale() -> None:
    flow = build(RealNVPConfig(levels=1, width=4, class_conditional=False), (3,)).double()
    x = data(400, 3) * 1e-9
    x[:, 1] = 7.0
    flow.initialize(x)
    assert torch.allclose(flow(x)[0].std(dim=0), torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64), atol=5e-3)
    other = build(RealNVPConfig(levels=1, width=4, class_conditional=False), (3,)).double()
    other.initialize(data(1, 3))  # of one sample nothing has a scale
    assert bool((other.log_scale == 0).all())  # type: ignore[union-attr]


def test_checkpointed_gradients_are_the_same_and_reach_all_parameters(tmp_path) -> None:  # type: ignore[no-untyped-def]
    flow = flow_of(4).train()
    x, y = data(6, 4), torch.arange(6) % 3
    found: list[list[Tensor]] = []
    for how in ("keep", "checkpoint"):
        flow.activations = how
        flow.zero_grad()
        (-flow.log_prob(x, y).mean()).backward()
        gradients = [parameter.grad for parameter in flow.parameters()]
        assert all(one is not None and bool(one.isfinite().all()) and bool((one != 0).any()) for one in gradients)
        found.append([one.clone() for one in gradients if one is not None])
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*found, strict=True))
    flow = flow.float().eval()
    save_flow(flow, str(tmp_path))
    assert torch.equal(load_flow(str(tmp_path)).log_prob(x.float(), y), flow.log_prob(x.float(), y))


def test_what_it_cannot_be_is_said() -> None:
    with pytest.raises(ConfigError, match="at least 2 dimensions"):
        build(RealNVPConfig(levels=1, class_conditional=False), (1,))
    with pytest.raises(ConfigError, match="must be actnorm"):
        build(RealNVPConfig(levels=1, class_conditional=False, normalization="batch"), (3,))
