"""A small flow with classes."""

import pytest
import torch

from tarflow_scale.config.model import TarFlowConfig
from tarflow_scale.flows import Flow, build
from tarflow_scale.records import PixelFormat


@pytest.fixture
def flow() -> Flow:
    torch.manual_seed(0)
    flow = build(TarFlowConfig(patch_size=2, width=16, layers_per_block=(1, 1), head_width=8), (1, 4, 4), 3)
    with torch.no_grad():
        for name, parameter in flow.named_parameters():
            parameter.add_((0.05 if "proj_out" in name else 0.3) * torch.randn_like(parameter))
    flow.pixels = PixelFormat(bit_depth=4, noise="uniform")
    return flow.eval()
