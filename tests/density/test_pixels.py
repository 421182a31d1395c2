"""Images in memory: the numbers equal those of the verbs."""

import numpy as np
import pytest
import torch

from tarflow_scale.config.model import MAFConfig
from tarflow_scale.config.protocols import BitsPerDimProtocol
from tarflow_scale.density import image_bits_per_dim, image_nats, image_tensor
from tarflow_scale.flows import build
from tarflow_scale.flows.likelihood import bits_per_dim, combine_draws
from tarflow_scale.loading import load
from tarflow_scale.metrics.bits import dequantized_draws
from tarflow_scale.shards.reader import ShardSet
from tests.conftest import Trained


def test_bits_per_dim_are_those_of_evaluate_and_nats_add_up_to_them(trained: Trained) -> None:
    flow, test = load("small@1", registry=str(trained.registry)), ShardSet(f"{trained.data}/test")
    batch = test.take(np.arange(20))
    y = torch.from_numpy(batch.labels)
    protocol = BitsPerDimProtocol(name="p", metric="bits_per_dim", bit_depth=4, num_draws=3, seed=5)
    with torch.no_grad():
        draws = torch.stack([flow.log_prob_of_images(x, y) for x in dequantized_draws(batch, protocol)]).double()
    for estimate in ("mean", "importance"):
        expected = bits_per_dim(combine_draws(draws, estimate), 64, 4).numpy()
        found = image_bits_per_dim(flow, batch.events, y, num_draws=3, seed=5, estimate=estimate)
        assert np.array_equal(found, expected)
    nats = image_nats(flow, batch.events, y, num_draws=3, seed=5)
    assert nats.shape == batch.events.shape
    assert nats.sum(axis=(1, 2, 3)) == pytest.approx(-draws.mean(dim=0).numpy(), rel=1e-5)
    assert not np.array_equal(image_bits_per_dim(flow, batch.events), image_bits_per_dim(flow, batch.events, y))


def test_no_draws_and_seeds_that_are_none_are_refused(trained: Trained) -> None:
    flow, images = load("small@1", registry=str(trained.registry)), np.zeros((2, 1, 8, 8), np.uint8)
    with pytest.raises(
        ValueError, match=r"^estimate must be mean or importance, .*\(got 'mean' and 0 draws\); correct it$"
    ):
        combine_draws(torch.zeros(0, 2), "mean")
    for use in (image_bits_per_dim, image_nats):
        with pytest.raises(ValueError, match=r"^num_draws must be at least 1 \(got 0\)"):
            use(flow, images, num_draws=0)
        with pytest.raises(ValueError, match=r"^seed must be an integer in 0\..* \(got -1\)"):
            use(flow, images, seed=-1)
        assert use(flow, images[:0]).shape[0] == 0
    mirrored = np.random.default_rng(0).integers(0, 256, (2, 1, 8, 8), np.uint8)[..., ::-1]
    assert np.array_equal(image_bits_per_dim(flow, mirrored), image_bits_per_dim(flow, mirrored.copy()))


def test_stored_pixels_come_back(trained: Trained) -> None:
    flow = load("small@1", registry=str(trained.registry))
    images = ShardSet(f"{trained.data}/test").take(np.arange(5)).events
    first, second = image_tensor(flow, images), image_tensor(flow, images, draw=1)
    assert not torch.equal(first, second)
    assert all((flow.stored(x).numpy() == images).all() for x in (first, second))


def test_what_has_no_bits_per_dim_is_refused(trained: Trained) -> None:
    flow = load("small@1", registry=str(trained.registry))
    with pytest.raises(ValueError, match="images must have shape"):
        image_bits_per_dim(flow, np.zeros((2, 1, 9, 9), np.uint8))
    for images in (np.zeros((2, 1, 8, 8)), np.zeros((2, 1, 8, 8), np.int64)):
        with pytest.raises(ValueError, match=r"must be a NumPy array of uint8, 0 to 255 \(got (float|int)64\)"):
            image_bits_per_dim(flow, images)
    with pytest.raises(ValueError, match=r"bits/dim need a flow of uniformly dequantized images \(got an unknown"):
        image_tensor(build(MAFConfig(class_conditional=False), (1, 8, 8)), np.zeros((2, 1, 8, 8), np.uint8))
