"""Pictures of surprise over images."""

import numpy as np

from tarflow_scale.density.surprise import overlaid


def test_red_grows_with_nats_and_what_is_expected_stays_grey() -> None:
    images = np.full((2, 3, 10, 10), 100, np.uint8)
    nats = np.broadcast_to(np.arange(200.0).reshape(2, 1, 10, 10) / 3, images.shape)
    found = overlaid(images, nats).astype(int)
    assert found.shape == images.shape
    assert (found[0, :, 0, 0] == 100).all()
    red = (found[:, 0] - found[:, 1]).reshape(-1)
    assert (np.diff(red) >= 0).all()
    assert (red[:10] == 0).all()
    assert red[-1] == round(0.25 * 100 + 0.75 * 255) - 25
    assert (red[30:-3:10] > red[20:-13:10]).all()
    assert (found[:, 1] == found[:, 2]).all()
    same = overlaid(images[:, :1], np.ones((2, 1, 10, 10)))
    assert same.shape == images.shape
    assert (same == 100).all()
