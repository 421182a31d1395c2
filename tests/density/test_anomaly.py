"""Anomaly scores against their definitions."""

import io

import numpy as np
import pytest
from PIL import Image

from tarflow_scale.density.anomaly import SCORES, codecs, compressed_bits_per_dim, scores_of, separate, threshold


def test_scores_are_higher_for_what_is_more_anomalous() -> None:
    bits, compressed, background = np.array([1.0, 3.0, 6.0]), np.array([2.0, 2.0, 7.0]), np.array([2.0, 2.5, 3.0])
    found = scores_of(bits, compressed, 3.0, background)
    assert set(found) == set(SCORES)
    assert found["likelihood"].tolist() == [1.0, 3.0, 6.0]
    assert found["complexity"].tolist() == [-1.0, 1.0, -1.0]
    assert found["typicality"].tolist() == [2.0, 0.0, 3.0]
    assert found["likelihood_ratio"].tolist() == [-1.0, 0.5, 3.0]
    assert "likelihood_ratio" not in scores_of(bits, compressed, 3.0, None)


def test_at_most_the_allowed_share_is_above_the_threshold() -> None:
    scores = np.random.default_rng(0).normal(size=997)
    for rate in (0.01, 0.05, 0.5):
        limit = threshold(scores, rate)
        above = (scores > limit).mean()
        assert rate - 1 / len(scores) < above <= rate
    assert (np.ones(10) > threshold(np.ones(10), 0.05)).sum() == 0


def test_separation_by_brute_force() -> None:
    random = np.random.default_rng(1)
    normal, anomalous = random.normal(size=60), random.normal(1.0, 1.0, size=40)
    found = separate(normal, anomalous)
    assert found.auroc == pytest.approx(np.mean([a > n for a in anomalous for n in normal]))
    limit = np.sort(anomalous)[2]  # 38 of 40, which is 95 %, are at it or above
    assert (anomalous >= limit).mean() == 0.95
    assert found.false_positive_rate_95 == (normal >= limit).mean()
    for num in (20, 40, 100):
        limits = separate(np.arange(num) - 0.5, np.arange(num) + 0.0)
        assert limits.false_positive_rate_95 == pytest.approx(0.95 - 1 / num)  # 95 % exactly are found
    everything = np.sort(np.concatenate([normal, anomalous]))[::-1]
    recalls = np.array([(anomalous >= value).mean() for value in everything])
    precisions = np.array([(anomalous >= v).sum() / ((anomalous >= v).sum() + (normal >= v).sum()) for v in everything])
    assert found.aupr == pytest.approx(float((np.diff(recalls, prepend=0.0) * precisions).sum()))
    assert separate(normal, normal.max() + 1 + anomalous**2).auroc == 1.0
    assert separate(normal, normal).auroc == pytest.approx(0.5)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_best_codec_counts_and_loses_nothing(channels: int) -> None:
    random = np.random.default_rng(2)
    flat = np.full((channels, 32, 32), 7, np.uint8)
    noise = random.integers(0, 256, (channels, 32, 32), dtype=np.uint8)
    found = compressed_bits_per_dim(np.stack([flat, noise]))
    assert found[0] < 1.5 < 8 < found[1] < 9.5
    assert set(codecs()) >= {"png", "webp", "jpeg2000"}
    for image in (flat, noise):
        picture = Image.fromarray(image[0] if channels == 1 else image.transpose(1, 2, 0))
        sizes = []
        for encode in codecs().values():
            content = encode(picture)
            sizes.append(len(content))
            decoded = np.asarray(Image.open(io.BytesIO(content)).convert(picture.mode))
            assert (decoded == np.asarray(picture)).all()
        assert 8 * min(sizes) / image.size in found.tolist()
