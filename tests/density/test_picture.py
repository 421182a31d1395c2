"""The picture of a density is dark where the density is high."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from tarflow_scale.config.model import MAFConfig, NICEConfig
from tarflow_scale.density.picture import density_picture, log_density
from tarflow_scale.flows import build

WIDTH, SIDE, LEFT = 700, 320, 44


def test_a_standard_normal_is_darkest_in_the_middle() -> None:
    flow = build(NICEConfig(class_conditional=False, width=4, hidden_layers=1), (2,)).eval()  # fresh: the identity
    picture = np.asarray(Image.open(io.BytesIO(density_picture(flow))).convert("L")).astype(int)
    assert picture.shape == (SIDE + 26, LEFT + 2 * SIDE + 16)
    panel = picture[:SIDE, LEFT : LEFT + SIDE]
    assert panel[150:170, 150:170].mean() < panel[5:15, 5:15].mean() - 100
    samples = picture[:SIDE, LEFT + SIDE + 16 :]
    assert (samples[110:210, 110:210] < 128).mean() > 5 * (samples[5:50, 5:50] < 128).mean()
    assert density_picture(flow) == density_picture(flow)


def test_the_density_of_a_flow_with_classes_is_the_mean_over_them() -> None:
    torch.manual_seed(0)
    flow = build(MAFConfig(transforms=1, hidden_widths=(8,)), (2,), 2).eval()
    x = torch.randn(5, 2)
    of_classes = torch.stack([flow.log_prob(x, torch.full((5,), label)) for label in (0, 1)])
    with torch.no_grad():
        assert torch.allclose(log_density(flow, x).exp(), of_classes.exp().mean(dim=0))


def test_other_flows_have_no_such_picture() -> None:
    sizes = {"width": 4, "hidden_layers": 1}
    with pytest.raises(ValueError, match="vectors of two numbers"):
        density_picture(build(NICEConfig(class_conditional=False, **sizes), (3,)))
    with pytest.raises(ValueError, match="given 1 numbers"):
        density_picture(build(NICEConfig(**sizes), (2,), None, 1))
