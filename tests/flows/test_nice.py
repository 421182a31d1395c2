"""NICE: which half of the dimensions shifts the other."""

import pytest
import torch

from tarflow_scale.config.model import NICEConfig
from tarflow_scale.flows.nice import NICE
from tests.flows.catalogue import moved


@pytest.mark.parametrize("dims", [4, 5])
def test_even_and_odd_dimensions_take_turns_and_volume_is_in_the_scale_alone(dims: int) -> None:
    torch.manual_seed(0)
    flow = NICE((dims,), None, NICEConfig(couplings=2, width=6, hidden_layers=1)).double()
    x = torch.randn(3, dims, dtype=torch.float64)
    z, log_det = flow(x)
    assert torch.equal(z, x)  # a fresh flow is the identity
    assert (log_det == 0).all()
    moved(flow, ())
    with torch.no_grad():
        for number in range(2):
            for parameter in flow.networks[1 - number].parameters():
                parameter.zero_()
            z = flow(x)[0] * (-flow.log_scale).exp()
            changed = ((z - x).abs() > 1e-12).any(dim=0)
            assert changed[0::2].sum() == (0 if number == 0 else (dims + 1) // 2)
            assert changed[1::2].sum() == (dims // 2 if number == 0 else 0)
            moved(flow.networks[1 - number], ())
        assert torch.allclose(flow(x)[1], flow.log_scale.sum())
    with pytest.raises(ValueError, match=r"at least 2 dimensions \(got 1\)"):
        NICE((1,), None, NICEConfig())
