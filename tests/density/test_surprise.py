"""Surprise laid over images."""

import numpy as np

from tarflow_scale.density.surprise import overlaid


def test_red_grows_with_nats_and_what_is_expected_stays_grey() -> None:
    images = np.full((2, 3, 10, 10), 100, np.uint8)
    nats = np.zeros((2, 3, 10, 10))
    nats[0, :, 2, 3] = 5.0
    nats[1, 0, 7, 7] = 7.5
    found = overlaid(images, nats).astype(int)
    assert found.shape == images.shape
    assert (found[0, :, 0, 0] == 100).all()
    red = found[:, 0] - found[:, 1]
    assert red[0, 2, 3] > 150
    assert 0 < red[1, 7, 7] < red[0, 2, 3]
    assert (red > 0).sum() == 2
    assert (overlaid(images[:, :1], np.ones((2, 1, 10, 10)))[:, 0] == 100).all()
