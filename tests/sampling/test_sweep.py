"""A sweep shows the same latents once under every setting."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from tarflow_scale.config.model import TarFlowConfig
from tarflow_scale.config.sampling import SamplingConfig
from tarflow_scale.errors import ConfigError
from tarflow_scale.flows import Flow, build
from tarflow_scale.records import PixelFormat
from tarflow_scale.sampling import Sampler
from tarflow_scale.sampling.sweep import sweep, sweep_picture


def test_a_row_for_every_setting_and_a_picture_of_them() -> None:
    torch.manual_seed(0)
    flow = build(TarFlowConfig(patch_size=2, width=16, layers_per_block=(1, 1), head_width=8), (1, 4, 4), 3).eval()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    flow.pixels = PixelFormat(bit_depth=4, noise="uniform")
    rows = sweep(flow, 3, 5, guidances=(0.0, 2.0), temperatures=(0.7, 1.0), attention_temperatures=(1.0, 0.8))
    assert len(rows) == 2 + 4  # the two attention temperatures are one without guidance
    for settings, images in rows:
        assert torch.equal(images, Sampler(flow, 3, settings).images(range(5)))
    assert torch.equal(rows[1][1], Sampler(flow, 3, SamplingConfig()).images(range(5)))
    picture = np.asarray(Image.open(io.BytesIO(sweep_picture(rows, zoom=4))))
    assert picture.shape[1] > 5 * 16
    assert picture.shape[0] >= 6 * 16
    for number in range(6):  # a label in front of every row
        middle = int((number + 0.5) * picture.shape[0] / 6)
        assert (picture[middle - 5 : middle + 5, :190] < 128).any()


def test_labels_by_name_and_settings_that_cannot_be(flow: Flow) -> None:
    flow.class_names = ("daisies", "roses", "tulips")
    ((settings, images),) = sweep(flow, 3, 4, labels=["roses", "tulips"])
    assert torch.equal(images, Sampler(flow, 3, settings, labels=(1, 2)).images(range(4)))
    assert not torch.equal(images, sweep(flow, 3, 4)[0][1])
    named = sweep(flow, 3, 4, labels=np.array(["roses", "tulips"]))
    assert torch.equal(named[0][1], images)
    with pytest.raises(ValueError, match=r"^the number of samples must be an integer >= 0 \(got -1\)"):
        sweep(flow, 3, -1)
    with pytest.raises(ValueError, match=r"^seed must be an integer in 0\..* \(got -3\)"):
        sweep(flow, -3, 4)
    for one in ("roses", 1):
        assert torch.equal(
            sweep(flow, 3, 4, labels=one)[0][1], Sampler(flow, 3, settings, labels=(1,)).images(range(4))
        )
    with pytest.raises(
        ConfigError, match=r"sampling.labels must be class names or numbers \(got rose, did you mean roses\?"
    ):
        sweep(flow, 3, 4, labels=["rose"])
    with pytest.raises(ConfigError, match=r"sampling.labels must be in 0..2 \(got \[3\]\)"):
        sweep(flow, 3, 4, labels=[3])
    with pytest.raises(ConfigError, match=r"temperature: .* \(got -1.0\)"):
        sweep(flow, 3, 4, temperatures=(-1.0,))
