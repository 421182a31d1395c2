"""Ranks: the rank of this process, the number of ranks, and the collective operations that the pipeline needs.

Importing this module does not import torch; the functions that need torch do. A single process is rank 0 of 1.
"""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from tarflow_scale.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, device
    from torch.nn import Module

__all__ = [
    "agent_serves_store",
    "all_reduce_sum",
    "all_reduce_sum_with_gradient",
    "backend_of",
    "barrier",
    "broadcast_module",
    "check_equal",
    "from_main",
    "gather",
    "is_main",
    "local_rank",
    "local_world_size",
    "own_device",
    "rank",
    "shut_down",
    "world_size",
]


T = TypeVar("T")


def rank() -> int:
    """Rank of this process, from the launcher's environment."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of ranks."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Rank of this process among the ranks on this machine; also the index of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Number of ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process is rank 0, which writes files and messages."""
    return rank() == 0


def agent_serves_store() -> bool:
    """Whether the agent of torchrun, instead of rank 0, listens at MASTER_PORT."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def own_device() -> "device":
    """This rank's device: its GPU if the machine has GPUs, else the CPU."""
    import torch

    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def backend_of(device: "device") -> str:
    """The communication backend for a device."""
    return "nccl" if device.type == "cuda" else "gloo"


def barrier() -> None:
    """Wait until every rank has called this function."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()


def all_reduce_sum(values: "Tensor") -> "Tensor":
    """Sum a tensor over ranks, in place, and return it."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def all_reduce_sum_with_gradient(values: "Tensor") -> "Tensor":
    """Return the sum of a tensor over ranks; its backward pass sums the gradients of all ranks."""
    import torch.distributed as dist

    if not dist.is_initialized() or world_size() == 1:
        return values
    from torch.distributed.nn.functional import all_reduce

    return all_reduce(values)  # pyright: ignore[reportReturnType]


def broadcast_module(module: "Module") -> None:
    """Copy the parameters and buffers of rank 0 to all ranks, in place."""
    import torch.distributed as dist

    if dist.is_initialized() and world_size() > 1:
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, src=0)


def check_equal(module: "Module") -> None:
    """Check by hash that all ranks have the same parameters and buffers, bit for bit.

    Raises:
        RuntimeError: tensors differ, which is a bug. Every rank raises the error, with the names of the tensors.
    """
    import hashlib

    import torch

    digests = {
        name: hashlib.sha256(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()).hexdigest()
        for name, tensor in module.state_dict().items()
    }
    all_digests = gather(digests)
    differing = sorted(name for name in digests if any(ranks.get(name) != digests[name] for ranks in all_digests))
    if differing or any(ranks.keys() != digests.keys() for ranks in all_digests):
        raise RuntimeError(f"ranks start from different tensors: {', '.join(differing) or 'different names'}")


def gather(value: T) -> list[T]:
    """Return the values of all ranks, in the order of ranks, on every rank; values must be picklable."""
    import torch.distributed as dist

    if not dist.is_initialized() or world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def from_main(compute: Callable[[], T]) -> T:
    """Run ``compute`` on rank 0, and return its result or raise its `UserError` on every rank."""
    import torch.distributed as dist

    if not dist.is_initialized() or world_size() == 1:
        return compute()
    outcome: list[Any] = [None, None]
    if is_main():
        try:
            outcome[0] = compute()
        except UserError as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def shut_down() -> None:
    """Destroy the process group, as NCCL requires of every rank; see also `tarflow_scale.runtime.processes.leave`."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
