"""Noise and label dropping: functions of (seed, epoch, sample), whatever the batch."""

import numpy as np
import torch

from tarflow_scale.records import PixelFormat
from tarflow_scale.shards.reader import Batch
from tarflow_scale.training.loop import dropped_labels, noisy_images

UNIFORM = PixelFormat(bit_depth=4, noise="uniform")


def batch(samples: list[int], epoch: int = 0) -> Batch:
    images = np.stack([np.full((1, 4, 4), 17 * (sample % 16), np.uint8) for sample in samples])
    return Batch(images, np.array([sample % 10 for sample in samples]), np.array(samples), np.full(len(samples), epoch))


def test_noise_follows_the_sample_not_the_batch() -> None:
    together = noisy_images(batch([5, 8, 13]), UNIFORM, seed=1)
    assert torch.equal(noisy_images(batch([8]), UNIFORM, seed=1)[0], together[1])
    assert torch.equal(noisy_images(batch([13, 5]), UNIFORM, seed=1)[1], together[0])
    assert not torch.equal(noisy_images(batch([8], epoch=1), UNIFORM, seed=1)[0], together[1])
    assert not torch.equal(noisy_images(batch([8]), UNIFORM, seed=2)[0], together[1])
    levels = torch.floor((together + 1) * 8)
    assert torch.equal(levels[:, 0, 0, 0], torch.tensor([5.0, 8.0, 13.0]))


def test_labels_are_dropped_at_the_rate_asked_for_and_alike_everywhere() -> None:
    samples = list(range(4000))
    labels = dropped_labels(batch(samples), 0.25, seed=0)
    rate = float((labels == -1).double().mean())
    assert abs(rate - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 4000)
    kept = labels != -1
    assert torch.equal(labels[kept], torch.tensor(samples)[kept] % 10)
    assert torch.equal(dropped_labels(batch(samples[100:200]), 0.25, seed=0), labels[100:200])
    assert (dropped_labels(batch(samples), 0.0, seed=0) >= 0).all()
    assert (dropped_labels(batch(samples), 1.0, seed=0) == -1).all()
