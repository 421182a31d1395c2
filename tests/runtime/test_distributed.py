"""Ranks without a launcher: one process is rank 0 of 1."""

import pytest
import torch

from tarflow_scale.runtime import distributed


def test_one_process_is_the_whole_world() -> None:
    assert (distributed.rank(), distributed.world_size(), distributed.local_world_size()) == (0, 1, 1)
    assert distributed.is_main()
    distributed.barrier()
    values = torch.tensor([1.0, 2.0])
    assert distributed.all_reduce_sum(values) is values
    assert values.tolist() == [1.0, 2.0]


def test_ranks_come_from_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (3, 8, False)
