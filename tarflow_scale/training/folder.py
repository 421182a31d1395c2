"""The run folder: one folder for all ranks, with a record of the settings and software versions of the run.

Ranks stop when their launcher dies; otherwise the ranks of a killed launcher would keep training beside the ranks of
the next launch.
"""

import os
import signal
import uuid
from typing import Any

import torch
import yaml

from tarflow_scale import storage
from tarflow_scale.errors import UserError
from tarflow_scale.records import canonical_json, changes
from tarflow_scale.runtime import distributed, provenance
from tarflow_scale.runtime.processes import die_with_parent

__all__ = ["STOP_SECONDS", "check_shared", "describe_run", "follow_launcher"]

STOP_SECONDS = 60.0
"""How long a new run waits for a stopping run to release the folder."""


def follow_launcher() -> None:
    """Let the kernel send this rank SIGTERM when its launcher dies; the rank then saves a checkpoint and stops."""
    if "RANK" in os.environ:
        die_with_parent(signal.SIGTERM)


def check_shared(path: str, device: torch.device) -> None:
    """Check that all ranks see the same run folder: rank 0 writes a file that the others look for.

    Raises:
        UserError: on every rank, if any rank does not see the file.
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
            f"logging.path must be one folder for all ranks (got {num_unseen} ranks that do not see {path} of rank 0); "
            f"put it on storage that all nodes share"
        )


def _leave_mark(path: str) -> str:
    mark = uuid.uuid4().hex
    storage.write_bytes(storage.join(path, f".shared-{mark}"), b"seen")
    return mark


def describe_run(path: str, resolved: dict[str, Any], images_seen: int) -> None:
    """Write ``config.yaml`` (settings) and ``environment.json`` (digest of settings, git commit, versions, ranks).

    If a run continues with other settings, print the changes and keep the earlier settings as
    ``config-until-IMAGES.yaml``.

    Args:
        path: the run folder.
        resolved: the configuration, as JSON.
        images_seen: number of images at which the run continues; 0 for a new run.
    """
    folder = storage.local(path)
    folder.mkdir(parents=True, exist_ok=True)
    current = folder / "config.yaml"
    if images_seen and current.exists():
        before = current.read_bytes()
        if changed := changes(yaml.safe_load(before), resolved):
            kept = folder / f"config-until-{images_seen:012d}.yaml"
            storage.write_bytes(str(kept), before)
            print(f"continuing with other settings: {changed} (the earlier settings are in {kept})")
    storage.write_bytes(str(current), yaml.safe_dump(resolved, sort_keys=False).encode())
    environment = {
        "config_digest": storage.digest(canonical_json(resolved)),
        "git_commit": provenance.git_commit(),
        "packages": provenance.package_versions(),
        "ranks": distributed.world_size(),
    }
    storage.write_bytes(str(folder / "environment.json"), canonical_json(environment))
