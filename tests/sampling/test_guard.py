"""The guard: bad images are counted and drawn again, or the work ends with an error."""

import pytest
import torch

from tarflow_scale.config.sampling import GuardConfig, SamplingConfig
from tarflow_scale.errors import NumericsError
from tarflow_scale.sampling import Quality, Sampler, guarded

LEVEL = 2 / 15


class Spoiled(Sampler):
    """A sampler that spoils some images of some attempts."""

    spoiled: dict[int, tuple[int, float]]
    """Index to the attempts that are spoiled, from the first, and the value of the spoiled pixels."""

    def draw(self, indices, attempt=0):
        x = super().draw(indices, attempt).clamp(-1, 1)
        for row, index in enumerate(indices):
            until, value = self.spoiled.get(index, (0, 0.0))
            if attempt < until:
                x[row, :, :4] = value
        return x


def drawn(flow, spoiled, batch_size=4, **guard):
    sampler = Spoiled(flow, 1, SamplingConfig(batch_size=batch_size))
    sampler.spoiled = spoiled
    batches = list(guarded(sampler, range(10), GuardConfig.model_validate(guard), LEVEL))
    quality = Quality()
    for batch in batches:
        quality = quality.plus(batch.quality)
    return torch.cat([batch.x for batch in batches]), [a for batch in batches for a in batch.attempts], quality


def test_good_images_are_those_of_the_sampler(flow) -> None:
    x, attempts, quality = drawn(flow, {})
    expected = torch.cat(list(Sampler(flow, 1, SamplingConfig(batch_size=4)).floats(range(10)))).clamp(-1, 1)
    assert torch.equal(x, expected)
    assert attempts == [0] * 10
    assert (quality.images, quality.redrawn, quality.not_finite, quality.saturated) == (10, 0, 0, 0)


def test_bad_images_are_drawn_again_and_the_others_stay(flow) -> None:
    good, _, _ = drawn(flow, {})
    x, attempts, quality = drawn(flow, {2: (1, float("nan")), 5: (2, float("inf")), 7: (1, 3.0)}, saturated_share=0.2)
    assert attempts == [0, 0, 1, 0, 0, 2, 0, 1, 0, 0]
    assert (quality.redrawn, quality.not_finite, quality.saturated) == (3, 3, 1)
    assert torch.isfinite(x).all()
    for index in (0, 1, 3, 4, 6, 8, 9):
        assert torch.equal(x[index], good[index])
    for index in (2, 5, 7):
        assert (x[index] - good[index]).abs().max() > 0.1  # another latent


def test_an_image_that_stays_bad_ends_the_work(flow) -> None:
    with pytest.raises(NumericsError, match="image 6 was not finite after 3 attempts; check the model"):
        drawn(flow, {6: (9, float("nan"))}, attempts=2)
    with pytest.raises(NumericsError, match="image 3 was saturated after 1 attempts"):
        drawn(flow, {3: (1, 2.0)}, attempts=0, saturated_share=0.1)


def test_saturation_is_counted_where_it_is_accepted(flow) -> None:
    _, attempts, quality = drawn(flow, {3: (9, 2.0)})
    assert attempts == [0] * 10
    assert quality.saturated == 0
    assert (quality.values, quality.outside) == (160, 16)
