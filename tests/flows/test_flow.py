"""The methods that all flows share: sampling and checks of labels."""

import numpy as np
import pytest
import torch

from tarflow_scale.config.model import TarFlowConfig
from tarflow_scale.config.sampling import Guidance
from tarflow_scale.errors import ConfigError
from tarflow_scale.flows import build
from tarflow_scale.flows.likelihood import quantize
from tarflow_scale.records import PixelFormat

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


def test_a_seed_draws_each_sample_by_its_number() -> None:
    flow = build(CONFIG, (1, 4, 4), 2).eval()
    whole = flow.sample(5, 1, seed=3)
    assert torch.equal(flow.sample(3, 1, seed=3), whole[:3])
    assert torch.equal(flow.sample(5, torch.ones(5, dtype=torch.int64), seed=3), whole)
    assert (flow.sample(5, 1, seed=3, batch_size=2) - whole).abs().max() < 1e-6
    assert not torch.equal(flow.sample(5, 1, seed=4), whole)
    assert torch.equal(flow.sample(2, 1, guidance=1.5, seed=0), flow.sample(2, 1, guidance=Guidance(scale=1.5), seed=0))
    assert flow.sample(0, seed=0).shape == (0, 1, 4, 4)
    with pytest.raises(ValueError, match=r"\(got both\); pass one of them"):
        flow.sample(1, seed=0, generator=torch.Generator())
    with pytest.raises(ValueError, match=r"in \[0, 2\) or -1 for dropped \(got 7\)"):
        flow.sample(2, 7, seed=0)


def test_samples_as_pictures() -> None:
    flow = build(CONFIG, (1, 4, 4), 2).eval()
    with pytest.raises(ValueError, match="has no pixel format"):
        flow.pictures(flow.sample(1, 0, seed=0))
    flow.pixels = PixelFormat(bit_depth=4, noise="uniform")
    pictures = flow.pictures(flow.sample(3, 0, seed=0))
    assert [(one.size, one.mode) for one in pictures] == [((4, 4), "L")] * 3
    stored = quantize(flow.sample(3, 0, seed=0), 4, "floor")
    assert np.array_equal(np.asarray(pictures[1]), stored[1, 0].numpy())
    colour = build(CONFIG, (3, 4, 4), 2).eval()
    colour.pixels = flow.pixels
    assert colour.pictures(colour.sample(1, 0, seed=0))[0].mode == "RGB"
