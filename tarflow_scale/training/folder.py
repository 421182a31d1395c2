"""The run folder: one run at a time, and one folder for all ranks; and ranks that do not outlive their launcher.

A launcher that is killed leaves its ranks behind, which would train on beside those of the next launch.
"""

import os
import signal
import uuid

import torch

from tarflow_scale import distributed, storage
from tarflow_scale.errors import UserError
from tarflow_scale.processes import die_with_parent

__all__ = ["STOP_SECONDS", "check_shared", "follow_launcher"]

STOP_SECONDS = 60.0
"""How long a run waits for one that is stopping to let go of its folder."""


def follow_launcher() -> None:
    """Have this rank told by SIGTERM when its launcher dies, so that it saves and stops."""
    if "RANK" in os.environ:
        die_with_parent(signal.SIGTERM)


def check_shared(path: str, device: torch.device) -> None:
    """All ranks must see one run folder, or only some would find the checkpoints; rank 0 leaves a mark to look for.

    Raises:
        UserError: on every rank, when some rank does not see it.
    """
    if distributed.world_size() == 1:
        return
    name = f".shared-{distributed.from_main(lambda: _leave_mark(path))}"
    unseen = torch.tensor([float(not storage.exists(storage.join(path, name)))], device=device)
    num_unseen = int(distributed.all_reduce_sum(unseen).item())
    if distributed.is_main():
        storage.remove(storage.join(path, name))
    if num_unseen:
        raise UserError(
            f"logging.path must be one folder for all ranks (got {num_unseen} that do not see {path} of rank 0); "
            f"put it on storage that all nodes share"
        )


def _leave_mark(path: str) -> str:
    mark = uuid.uuid4().hex
    storage.write_bytes(storage.join(path, f".shared-{mark}"), b"seen")
    return mark
