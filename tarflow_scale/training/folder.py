"""The run folder: one run at a time, one folder for all ranks, what made it; and ranks that end with their launcher.

A launcher that is killed leaves its ranks behind, which would train on beside those of the next launch.
"""

import os
import signal
import uuid

import torch
import yaml

from tarflow_scale import storage
from tarflow_scale.config.train import TrainConfig
from tarflow_scale.errors import UserError
from tarflow_scale.records import canonical_json, changes
from tarflow_scale.runtime import distributed, provenance
from tarflow_scale.runtime.processes import die_with_parent

__all__ = ["STOP_SECONDS", "check_shared", "configuration_of", "describe_run", "follow_launcher"]

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


def configuration_of(config: TrainConfig) -> bytes:
    """The resolved configuration, as it is hashed and registered."""
    return canonical_json(config.model_dump(mode="json"))


def describe_run(config: TrainConfig, images_seen: int) -> None:
    """Leave beside the results what made them: resolved configuration, its digest, commit and versions.

    Where a run goes on with other settings, say which, and keep the earlier ones as ``config-until-IMAGES.yaml``.
    """
    folder = storage.local(config.logging.path)
    folder.mkdir(parents=True, exist_ok=True)
    current, resolved = folder / "config.yaml", config.model_dump(mode="json")
    if images_seen and current.exists():
        before = current.read_bytes()
        if changed := changes(yaml.safe_load(before), resolved):
            kept = folder / f"config-until-{images_seen:012d}.yaml"
            storage.write_bytes(str(kept), before)
            print(f"going on with other settings: {changed} (the earlier ones: {kept})")
    storage.write_bytes(str(current), yaml.safe_dump(resolved, sort_keys=False).encode())
    facts = {
        "config_digest": storage.digest(configuration_of(config)),
        "git_commit": provenance.git_commit(),
        "packages": provenance.package_versions(),
        "ranks": distributed.world_size(),
    }
    storage.write_bytes(str(folder / "environment.json"), canonical_json(facts))
