"""Counter-based random numbers."""

import numpy as np
import pytest

from tarflow_scale.randomness import Purpose, generator, integer, permutation


def test_the_raw_stream_is_numpys_philox_of_key_and_counter() -> None:
    bits = np.random.Philox(key=np.array([5, 7], dtype=np.uint64), counter=np.array([0, 0, 9, 6], dtype=np.uint64))
    assert generator(Purpose.LATENT, 5, 7, 9).bit_generator.random_raw() == bits.random_raw()


def test_a_stream_depends_on_every_coordinate_and_on_nothing_else() -> None:
    coordinates = [
        (p, s, i, n) for p in (Purpose.NOISE, Purpose.LATENT) for s in (0, 1) for i in (0, 1) for n in (0, 1)
    ]
    draws = [generator(*c).random() for c in coordinates]
    assert len(set(draws)) == len(coordinates)
    assert draws == [generator(*c).random() for c in coordinates]


def test_standard_values_of_philox() -> None:
    # Known-answer test of Random123 1.14 (kat_vectors): philox4x64 10, counter 0, key 0. NumPy increments the counter
    # before its first block, so it starts one lower.
    start = np.array([2**64 - 1] * 4, dtype=np.uint64)
    words = np.random.Philox(key=np.zeros(2, dtype=np.uint64), counter=start).random_raw(4)
    expected = [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    assert [int(word) for word in words] == expected


@pytest.mark.parametrize("size", [1, 2, 17, 1000])
def test_permutation_is_one(size: int) -> None:
    order = permutation(size, Purpose.SHARD_ORDER, 3, 4)
    assert sorted(order.tolist()) == list(range(size))
    assert (order == permutation(size, Purpose.SHARD_ORDER, 3, 4)).all()


def test_permutations_are_uniform_over_all_orders() -> None:
    orders = [tuple(permutation(3, Purpose.SAMPLE_ORDER, seed).tolist()) for seed in range(6000)]
    counts = np.array([orders.count(order) for order in set(orders)])
    assert len(counts) == 6
    assert abs(counts - 1000).max() < 5 * np.sqrt(1000 * 5 / 6)  # five standard deviations


def test_integers_cover_their_range() -> None:
    assert {integer(5, Purpose.ROTATION, seed) for seed in range(200)} == set(range(5))
