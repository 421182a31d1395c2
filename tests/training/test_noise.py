"""Noise and label dropping: functions of (seed, epoch, sample), whatever the batch and the device."""

import math

import numpy as np
import pytest
import torch

from tarflow_scale.records import PixelFormat
from tarflow_scale.shards.reader import Batch
from tarflow_scale.training.noise import Philox, dropped_labels, model_input, sample_noise

UNIFORM = PixelFormat(bit_depth=4, noise="uniform")
CPU = torch.device("cpu")


def batch(samples: list[int], epoch: int = 0) -> Batch:
    images = np.stack([np.full((1, 4, 4), 17 * (sample % 16), np.uint8) for sample in samples])
    return Batch(images, np.array([sample % 10 for sample in samples]), np.array(samples), np.full(len(samples), epoch))


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_standard_values_of_philox(counter: str, key: str, expected: str) -> None:
    # Known-answer tests of Random123 1.14 (kat_vectors): philox4x32 10.
    first, second = (int(word, 16) for word in key.split())
    words = Philox((first, second)).words([torch.tensor(int(word, 16)) for word in counter.split()])
    assert " ".join(f"{int(word):08x}" for word in words) == expected


def test_noise_follows_the_sample_not_the_batch() -> None:
    together = model_input(batch([5, 8, 13]), UNIFORM, 1, CPU)
    assert torch.equal(model_input(batch([8]), UNIFORM, 1, CPU)[0], together[1])
    assert torch.equal(model_input(batch([13, 5]), UNIFORM, 1, CPU)[1], together[0])
    assert not torch.equal(model_input(batch([8], epoch=1), UNIFORM, 1, CPU)[0], together[1])
    assert not torch.equal(model_input(batch([8]), UNIFORM, 2, CPU)[0], together[1])
    levels = torch.floor((together + 1) * 8)
    assert torch.equal(levels[:, 0, 0, 0], torch.tensor([5.0, 8.0, 13.0]))


def test_every_bit_of_seed_epoch_and_sample_counts() -> None:
    coordinates = [(0, 0, 0), (1, 0, 0), (1 << 32, 0, 0), (0, 1, 0), (0, 1 << 31, 0), (0, 0, 1), (0, 0, 1 << 40)]
    draws = [
        tuple(sample_noise("uniform", seed, np.array([epoch]), np.array([sample]), 6, CPU).flatten().tolist())
        for seed, epoch, sample in coordinates
    ]
    assert len(set(draws)) == len(draws)
    assert all(len(set(draw)) == 6 for draw in draws)


def test_images_with_channels_last_in_memory_get_the_same_noise() -> None:
    images = np.arange(2 * 3 * 4 * 4, dtype=np.uint8).reshape(2, 3, 4, 4)
    last = np.ascontiguousarray(images.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    zeros = np.zeros(2, np.int64)
    first, second = (model_input(Batch(i, zeros, zeros, zeros), UNIFORM, 1, CPU) for i in (images, last))
    assert torch.equal(first, second)
    assert second.is_contiguous()


@pytest.mark.parametrize("kind", ["uniform", "gaussian"])
def test_noise_has_its_distribution(kind: str) -> None:
    noise = sample_noise(kind, 3, np.zeros(500, np.int64), np.arange(500), 401, CPU)  # pyright: ignore[reportArgumentType]
    assert noise.dtype == torch.float32
    assert noise.shape == (500, 401)
    ordered = np.sort(noise.double().flatten().numpy())
    num = len(ordered)
    expected = ordered if kind == "uniform" else np.array([0.5 * math.erfc(-x / math.sqrt(2)) for x in ordered])
    distance = np.abs(expected - (np.arange(num) + 0.5) / num).max()
    assert distance < 2.2 / math.sqrt(num)  # Kolmogorov's distribution: exceeded with probability 1.3e-4
    rows = np.corrcoef(noise[:40].double().numpy())
    assert np.abs(rows - np.eye(40)).max() < 5 / math.sqrt(401)
    columns = np.corrcoef(noise[:, :40].double().numpy().T)
    assert np.abs(columns - np.eye(40)).max() < 5 / math.sqrt(500)
    if kind == "uniform":
        assert 0 <= ordered[0] < ordered[-1] < 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_noise_on_a_gpu_is_that_of_the_cpu() -> None:
    samples = np.arange(7) << 33
    for kind, bound in (("uniform", 0.0), ("gaussian", 1e-5)):
        here, there = (
            sample_noise(kind, 2**63 + 5, samples % 5, samples, 3001, torch.device(name)).cpu()  # pyright: ignore[reportArgumentType]
            for name in ("cpu", "cuda")
        )
        assert (here - there).abs().max() <= bound


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
