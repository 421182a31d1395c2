"""Sampling: image i depends on (weights, seed, i), not on batch, order or company."""

import numpy as np
import pytest
import torch

from tarflow_scale.config import Guidance, SamplingConfig, TarFlowConfig
from tarflow_scale.errors import NumericsError
from tarflow_scale.flows import Flow, build
from tarflow_scale.randomness import Purpose, generator
from tarflow_scale.records import PixelFormat
from tarflow_scale.sampling import Sampler, balanced_labels, latents


@pytest.fixture
def flow() -> Flow:
    torch.manual_seed(0)
    flow = build(TarFlowConfig(patch_size=2, width=16, layers_per_block=(1, 1), head_width=8), (1, 4, 4), 3)
    with torch.no_grad():
        for name, parameter in flow.named_parameters():
            parameter.add_((0.05 if "proj_out" in name else 0.3) * torch.randn_like(parameter))
    flow.pixels = PixelFormat(bit_depth=4, noise="uniform")
    return flow.eval()


def test_a_latent_depends_on_seed_and_index_alone() -> None:
    whole = latents(5, range(10), 7)
    assert torch.equal(latents(5, range(4, 6), 7), whole[4:6])
    assert not torch.equal(latents(6, range(10), 7), whole)
    expected = generator(Purpose.LATENT, 5, 3).standard_normal(7, np.float32)
    assert np.array_equal(whole[3].numpy(), expected)


def test_latents_are_standard_normal() -> None:
    z = latents(0, range(2000), 50).double()
    assert abs(float(z.mean())) < 5 / np.sqrt(z.numel())
    assert abs(float(z.var()) - 1) < 5 * np.sqrt(2 / z.numel())
    neighbours = (z[:-1] * z[1:]).mean()
    assert abs(float(neighbours)) < 5 / np.sqrt(z.numel())


def sampler(flow: Flow, batch_size: int, guidance: float = 0.0) -> Sampler:
    return Sampler(flow, 1, SamplingConfig(batch_size=batch_size, guidance=Guidance(scale=guidance)))


@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_images_do_not_depend_on_the_batch(flow: Flow, guidance: float) -> None:
    whole = torch.cat(list(sampler(flow, 20, guidance).floats(range(20))))
    for batch_size in (1, 7):
        parts = torch.cat(list(sampler(flow, batch_size, guidance).floats(range(20))))
        assert (parts - whole).abs().max() < 1e-5
    alone = torch.cat(list(sampler(flow, 4, guidance).floats(range(13, 17))))
    assert (alone - whole[13:17]).abs().max() < 1e-5


def test_labels_run_through_the_classes() -> None:
    assert balanced_labels(range(4, 9), 3).tolist() == [1, 2, 0, 1, 2]


def test_images_are_stored_pixels(flow: Flow) -> None:
    images = sampler(flow, 8).images(range(10))
    assert images.shape == (10, 1, 4, 4)
    assert images.dtype == torch.uint8
    assert (images % 17 == 0).all()


def test_a_flow_that_overflows_is_not_an_image(flow: Flow) -> None:
    with torch.no_grad():
        flow.blocks[0].proj_out.bias.fill_(float("nan"))  # type: ignore[union-attr,operator]
    with pytest.raises(NumericsError, match=r"not finite \(images 0 to 1\)"):
        sampler(flow, 8).images(range(2))
