"""Ranks: who am I, how many are we, and the three collectives the pipeline needs.

Imported cheaply; torch is imported when a function that needs it is called. A single process is rank 0 of 1.
"""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["all_reduce_sum", "barrier", "is_main", "local_world_size", "rank", "shut_down", "world_size"]


def rank() -> int:
    """Rank of this process, from the launcher's environment."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of ranks."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Number of ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process writes what is written once."""
    return rank() == 0


def barrier() -> None:
    """Wait until every rank is here."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()


def all_reduce_sum(values: "Tensor") -> "Tensor":
    """Sum over ranks, in place; returns ``values``."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def shut_down() -> None:
    """Leave the process group; a gloo rank that ends without it sometimes exits with an error."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
