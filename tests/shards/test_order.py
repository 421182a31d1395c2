"""The order of samples has the properties that its docstring proves."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tarflow_scale.errors import DataError
from tarflow_scale.shards.order import Line, OrderSpec, SlotWalk, steps_per_epoch


@st.composite
def specs(draw: st.DrawFn) -> OrderSpec:
    shards = draw(st.lists(st.integers(1, 40), min_size=1, max_size=8))
    return OrderSpec(
        samples_per_shard=tuple(shards),
        num_slots=draw(st.integers(1, min(24, sum(shards)))),
        shuffle_block=draw(st.integers(1, 12)),
        seed=draw(st.integers(0, 2**32)),
    )


def sample_at(line: Line, walk: SlotWalk, step: int) -> tuple[int, int]:
    """The shard, and the index in the shard, of the sample that a slot takes at a step."""
    block = walk.block_at(step)
    start, _ = walk.block_range(block)
    position = start + int(walk.block_order(block)[step - int(walk.visit_starts[block])])
    ((shard, index, _),) = line.runs(position, position + 1)
    return shard, index


def epoch_samples(spec: OrderSpec, epoch: int) -> np.ndarray:
    """Global sample numbers ``(steps, slots)`` of an epoch, position by position."""
    first = np.concatenate([[0], np.cumsum(spec.samples_per_shard)])
    line = Line(spec, epoch)
    walks = [SlotWalk(spec, epoch, slot) for slot in range(spec.num_slots)]
    steps = [[sample_at(line, walk, step) for walk in walks] for step in range(steps_per_epoch(spec))]
    return np.array([[first[shard] + index for shard, index in step] for step in steps], dtype=np.int64)


@settings(max_examples=60, deadline=None)
@given(specs(), st.integers(0, 5))
def test_an_epoch_shows_every_sample_once_but_for_less_than_a_batch(spec: OrderSpec, epoch: int) -> None:
    seen = epoch_samples(spec, epoch).reshape(-1)
    assert len(set(seen.tolist())) == len(seen)
    assert 0 <= spec.num_samples - len(seen) < spec.num_slots
    assert seen.min() >= 0
    assert seen.max() < spec.num_samples


@settings(max_examples=60, deadline=None)
@given(specs(), st.integers(0, 5))
def test_blocks_are_contiguous_disjoint_ranges_that_fill_the_stretch(spec: OrderSpec, epoch: int) -> None:
    length = steps_per_epoch(spec)
    for slot in range(spec.num_slots):
        walk = SlotWalk(spec, epoch, slot)
        ranges = sorted(walk.block_range(block) for block in range(len(walk.block_lengths)))
        assert ranges[0][0] == slot * length
        assert ranges[-1][1] == (slot + 1) * length
        assert all(a[1] == b[0] for a, b in pairwise(ranges))
        assert walk.block_lengths.max() <= spec.shuffle_block


def test_the_first_block_of_slot_j_is_shorter_by_its_share() -> None:
    spec = OrderSpec(samples_per_shard=(1000,), num_slots=8, shuffle_block=16, seed=0)
    assert [int(SlotWalk(spec, 0, slot).block_lengths[0]) for slot in range(8)] == [16, 14, 12, 10, 8, 6, 4, 2]


def test_slots_refill_on_different_steps() -> None:
    spec = OrderSpec(samples_per_shard=(6400,), num_slots=16, shuffle_block=16, seed=0)
    refills = np.zeros(steps_per_epoch(spec), dtype=int)
    for slot in range(16):
        starts = SlotWalk(spec, 0, slot).visit_starts[1:-1]
        refills[starts] += 1
    assert refills[16:-16].max() == 1


def test_epochs_and_seeds_differ() -> None:
    spec = OrderSpec(samples_per_shard=(50, 60, 70), num_slots=6, shuffle_block=8, seed=0)
    other = OrderSpec(samples_per_shard=(50, 60, 70), num_slots=6, shuffle_block=8, seed=1)
    orders = [epoch_samples(spec, 0), epoch_samples(spec, 1), epoch_samples(other, 0)]
    assert not any((a == b).all() for a, b in [(orders[0], orders[1]), (orders[0], orders[2]), (orders[1], orders[2])])
    assert (epoch_samples(spec, 0) == orders[0]).all()


def test_the_rotation_lets_every_sample_in_sooner_or_later() -> None:
    spec = OrderSpec(samples_per_shard=(11,), num_slots=4, shuffle_block=2, seed=0)
    seen = {int(sample) for epoch in range(40) for sample in epoch_samples(spec, epoch).reshape(-1)}
    assert seen == set(range(11))


def test_neighbours_are_well_mixed() -> None:
    """Neighbours in a shard must not stay neighbours: position and step have a correlation near zero."""
    spec = OrderSpec(samples_per_shard=(500,) * 8, num_slots=32, shuffle_block=8, seed=0)
    seen = epoch_samples(spec, 0)
    times = np.repeat(np.arange(len(seen)), seen.shape[1])
    correlation = np.corrcoef(times, seen.reshape(-1))[0, 1]
    assert abs(correlation) < 4 / np.sqrt(seen.size)


def test_a_batch_larger_than_the_data_set_is_refused() -> None:
    with pytest.raises(DataError, match=r"than it has \(got 11, and the data set has 10\)"):
        OrderSpec(samples_per_shard=(10,), num_slots=11, shuffle_block=1, seed=0)


def test_a_million_samples_are_planned_at_once() -> None:
    spec = OrderSpec(samples_per_shard=(1000,) * 1000, num_slots=256, shuffle_block=64, seed=0)
    walk = SlotWalk(spec, 3, 255)
    middle = steps_per_epoch(spec) // 2
    shard, index = sample_at(Line(spec, 3), walk, middle)
    assert 0 <= shard < 1000
    assert 0 <= index < 1000
