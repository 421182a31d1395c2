"""What all flows share: sampling and the check of labels."""

import pytest
import torch

from tarflow_scale.config import TarFlowConfig
from tarflow_scale.errors import ConfigError
from tarflow_scale.flows import build

CONFIG = TarFlowConfig(patch_size=2, width=16, layers_per_block=(1,), head_width=8)


def test_temperature_zero_is_deterministic_and_does_not_touch_log_prob() -> None:
    flow = build(CONFIG, (1, 4, 4), 2).eval()
    x = torch.randn(2, 1, 4, 4)
    before = flow.log_prob(x)
    assert torch.equal(flow.sample(2, temperature=0.0), flow.sample(2, temperature=0.0))
    a = flow.sample(3, torch.tensor([0, 1, 0]), generator=torch.Generator().manual_seed(0))
    b = flow.sample(3, torch.tensor([0, 1, 0]), generator=torch.Generator().manual_seed(0))
    assert torch.equal(a, b)
    assert a.shape == (3, 1, 4, 4)
    assert torch.equal(flow.log_prob(x), before)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 2]), r"labels must be in \[0, 2\) or -1 for dropped \(got 2\)"),
        (torch.tensor([-2, 0]), r"\(got -2\)"),
        (torch.tensor([0]), r"labels must have shape \(2,\) \(got \(1,\)\)"),
    ],
)
def test_labels_that_do_not_fit(labels: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(CONFIG, (1, 4, 4), 2).sample(2, labels)


def test_a_conditional_model_needs_classes() -> None:
    with pytest.raises(ConfigError, match="needs a data set with classes"):
        build(CONFIG, (1, 4, 4), None)
    unconditional = build(CONFIG.model_copy(update={"class_conditional": False}), (1, 4, 4), 2)
    assert unconditional.num_classes is None
    with pytest.raises(ValueError, match="takes no labels"):
        unconditional.sample(1, torch.tensor([0]))
