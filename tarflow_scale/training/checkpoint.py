"""Checkpoints that are either whole or absent, and do not know the ZeRO stage or the number of ranks.

A checkpoint is a folder ``images-000000064000/`` of safetensors files, written by all ranks in parallel: per
parameter name the fp32 master weight, both optimizer moments and the moving average, and every buffer. Parameter i
is gathered, kept by rank i mod N, and dropped before the next. ``manifest.json`` (size and sha256 of every file, and
the training state) is written last: without it the folder is not a checkpoint. "Latest" is the newest folder with a
manifest. Nothing is pickled.

Tensor names: ``weight/<name>``, ``exp_avg/<name>``, ``exp_avg_sq/<name>``, ``average/<name>``, ``buffer/<name>``.
"""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist
from pydantic import Field
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from tarflow_scale import storage
from tarflow_scale.distributed import barrier, is_main, rank, world_size
from tarflow_scale.errors import DataError
from tarflow_scale.records import FileRecord, Record
from tarflow_scale.training.ema import WeightAverage
from tarflow_scale.training.engine import MOMENTS, Engine

__all__ = ["CheckpointManifest", "TrainState", "find_latest", "load", "save"]

_MANIFEST = "manifest.json"
_FOLDER = "images-{images:012d}"


class TrainState(Record):
    """All that a resumed run needs besides tensors. Random numbers have no state: they are functions of counts."""

    images_seen: int = Field(ge=0)
    num_steps: int = Field(ge=0)
    """Updates the optimizer has made."""
    skipped_steps: int = Field(ge=0)
    skipped_in_a_row: int = Field(ge=0)
    num_replaced: int = Field(default=0, ge=0)
    """Corrupt samples that others stood in for."""
    loss_sum: float
    """Sum of nats per dimension over the steps since the last line of the log."""
    loss_steps: int = Field(ge=0)
    seconds: float = Field(ge=0)
    """Time spent in training so far."""
    run: dict[str, Any]
    """What must not change between a run and its continuation."""


class CheckpointManifest(Record):
    """Files of a complete checkpoint, and the training state."""

    files: dict[str, FileRecord]
    state: TrainState


def save(path: str, engine: Engine, average: WeightAverage, state: TrainState, keep_last: int) -> None:
    """Write a checkpoint below ``path``; all ranks must call. Older ones beyond ``keep_last`` are deleted after."""
    folder = storage.join(path, _FOLDER.format(images=state.images_seen))
    if is_main():
        storage.remove_tree(folder)  # the debris of a save that was interrupted here
    barrier()
    name = f"part-{rank():05d}-of-{world_size():05d}.safetensors"
    content = save_tensors(_share(engine, average))
    storage.write_bytes(storage.join(folder, name), content)
    record = FileRecord(sha256=storage.digest(content), bytes=len(content))
    records: list[Any] = [None] * world_size()
    dist.all_gather_object(records, (name, record.model_dump()))
    if is_main():
        files = {file: FileRecord.model_validate(entry) for file, entry in records}
        manifest = CheckpointManifest(files=files, state=state)
        storage.write_bytes(storage.join(folder, _MANIFEST), manifest.to_json())
        _prune(path, keep_last)
    barrier()


def find_latest(path: str) -> tuple[str, TrainState] | None:
    """Folder and state of the newest complete checkpoint whose files are intact, or None.

    A damaged one is passed over with a warning, in favour of the one before it.
    """
    for folder in reversed(_complete(path)):
        try:
            return folder, _verified(folder).state
        except DataError as error:
            warnings.warn(f"skipping a damaged checkpoint: {error}", stacklevel=2)
    return None


def load(folder: str, engine: Engine, average: WeightAverage, prime: Callable[[], object]) -> None:
    """Restore the engine and the average from a complete checkpoint; all ranks must call.

    Args:
        folder: the checkpoint.
        engine: to be overwritten.
        average: to be overwritten.
        prime: takes one step on any batch, because DeepSpeed's moments do not exist before; all that it changes
            is overwritten.
    """
    prime()
    manifest = _verified(folder)
    for file in manifest.files:
        tensors = load_tensors(storage.read_bytes(storage.join(folder, file)))
        for name, value in _of_kind(tensors, "weight"):
            engine.set_master(name, value)
            engine.set_working_copy(name, value)
        for moment in MOMENTS:
            for name, value in _of_kind(tensors, moment):
                engine.set_moment(name, moment, value)
        buffers = engine.buffers()
        for name, value in _of_kind(tensors, "buffer"):
            buffers[name].copy_(value)
        average.load(_of_kind(tensors, "average"))
    engine.set_num_steps(manifest.state.num_steps)
    barrier()


def _share(engine: Engine, average: WeightAverage) -> dict[str, Tensor]:
    """This rank's tensors; every rank takes part in gathering all of them."""
    own: dict[str, Tensor] = {}
    for i, name in enumerate(engine.names):
        mine = i % world_size() == rank()
        for kind, full in [
            ("weight", engine.full_weight(name)),
            *((moment, engine.full_moment(name, moment)) for moment in MOMENTS),
        ]:
            if mine:
                own[f"{kind}/{name}"] = _for_file(full)
    for i, (name, full) in enumerate(average.full()):
        if i % world_size() == rank():
            own[f"average/{name}"] = _for_file(full)
    if is_main():
        own.update({f"buffer/{name}": _for_file(buffer) for name, buffer in engine.buffers().items()})
    return own


def _for_file(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _of_kind(tensors: dict[str, Tensor], kind: str) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a kind by name, sorted: a file is read in no fixed order, but ranks must gather in the same one."""
    prefix = f"{kind}/"
    return ((name.removeprefix(prefix), tensors[name]) for name in sorted(tensors) if name.startswith(prefix))


def _complete(path: str) -> list[str]:
    """Folders with a manifest, oldest first."""
    folders = [storage.join(path, name) for name in storage.list_names(path) if name.startswith("images-")]
    return [folder for folder in folders if storage.exists(storage.join(folder, _MANIFEST))]


def _verified(folder: str) -> CheckpointManifest:
    location = storage.join(folder, _MANIFEST)
    manifest = CheckpointManifest.from_json(storage.read_bytes(location), location, DataError)
    for file, record in manifest.files.items():
        if not storage.exists(storage.join(folder, file)):
            raise DataError(f"{folder}/{file} is missing, though the manifest names it; delete the checkpoint")
        content = storage.read_bytes(storage.join(folder, file))
        if storage.digest(content) != record.sha256:
            raise DataError(f"{folder}/{file} does not match its manifest (sha256 differs); delete the checkpoint")
    return manifest


def _prune(path: str, keep_last: int) -> None:
    for folder in _complete(path)[:-keep_last]:
        storage.remove(storage.join(folder, _MANIFEST))
        storage.remove_tree(folder)
