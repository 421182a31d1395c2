"""Checkpoints that are either complete or absent, and independent of the ZeRO stage and the number of ranks.

A checkpoint is a folder ``images-000000064000/`` of safetensors files, written by all ranks in parallel. For each
parameter it contains the fp32 master weight, the optimizer's moments and all moving averages; it also contains all
buffers. All ranks gather parameter i, rank i mod N keeps it, and each rank writes its tensors to files of about 1 GiB.
``manifest.json`` (size and SHA-256 of every file, and the training state) is written last; a folder without it is not a
checkpoint. Nothing is pickled.

Tensor names: ``weight/<name>``, ``exp_avg/<name>`` and ``exp_avg_sq/<name>`` or ``momentum_buffer/<name>``,
``average/<name>`` for the first average, ``average-<half-life>/<name>`` for the others, ``buffer/<name>``.
"""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from pydantic import Field
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from tarflow_scale import storage
from tarflow_scale.config.train import CheckpointConfig
from tarflow_scale.errors import DataError, StorageError
from tarflow_scale.records import FileRecord, Record
from tarflow_scale.runtime.distributed import barrier, gather, is_main, rank, world_size
from tarflow_scale.training.ema import WeightAverages
from tarflow_scale.training.engine import MOMENTS, MOMENTUM, Engine

__all__ = [
    "MANIFEST",
    "CheckpointManifest",
    "TrainState",
    "complete",
    "find_latest",
    "load",
    "newest",
    "newest_at_rate",
    "prune",
    "save",
]

MANIFEST = "manifest.json"
_FOLDER = "images-{images:012d}"
_FILE_BYTES = 1 << 30
"""A rank writes a file when its tensors reach this size. It holds this much in memory, and briefly twice as much."""


class TrainState(Record):
    """The state of a run except its tensors. Random numbers have no state; they depend only on seeds and counts."""

    images_seen: int = Field(ge=0)
    num_steps: int = Field(ge=0)
    """Number of optimizer updates."""
    skipped_steps: int = Field(ge=0)
    skipped_in_a_row: int = Field(ge=0)
    num_replaced: int = Field(default=0, ge=0)
    """Number of corrupt samples that were replaced by other samples."""
    loss_sum: float
    """Sum of nats per dimension over the steps since the last line of the log."""
    figure_sums: tuple[float, ...] = ()
    """The same sums of the other figures of the objective."""
    loss_steps: int = Field(ge=0)
    seconds: float = Field(ge=0)
    """Training time so far."""
    recent_losses: tuple[float, ...] = ()
    """Losses with which the spike rule compares the next loss."""
    roll_backs: int = Field(default=0, ge=0)
    learning_rate: float | None = None
    """AdamW's learning rate for the next step; None in old checkpoints."""
    run: dict[str, Any]
    """The settings that must not change when the run continues."""


class CheckpointManifest(Record):
    """Files of a complete checkpoint, and the training state."""

    files: dict[str, FileRecord]
    state: TrainState


def save(
    path: str, engine: Engine, averages: WeightAverages, state: TrainState, config: CheckpointConfig
) -> tuple[str, tuple[str, ...]]:
    """Write a checkpoint below ``path``, then delete checkpoints that ``config`` does not keep; all ranks must call.

    Returns:
        The folder of the checkpoint, and the names of the files that this rank wrote.

    Raises:
        StorageError: on every rank, if any rank cannot write; the incomplete checkpoint is removed, and the previous
            checkpoint stays.
    """
    folder = storage.join(path, _FOLDER.format(images=state.images_seen))
    if is_main():
        storage.remove_tree(folder)  # files of an interrupted save
    barrier()
    files = _Files(folder)
    _write_share(files, engine, averages)
    outcomes = gather((files.records, files.failure))
    failure = next((failure for _, failure in outcomes if failure), None)
    if is_main() and failure is None:
        records = {name: FileRecord.model_validate(file) for written, _ in outcomes for name, file in written.items()}
        try:
            manifest = CheckpointManifest(files=records, state=state)
            storage.write_bytes(storage.join(folder, MANIFEST), manifest.to_json())
        except StorageError as error:
            failure = str(error)
    failure = gather(failure)[0]
    if failure is not None:
        if is_main():
            with contextlib.suppress(StorageError):
                storage.remove_tree(folder)
        raise StorageError(f"{failure}; no checkpoint was made at {state.images_seen} images; the previous one is kept")
    if is_main():
        prune(path, config)
    barrier()
    return folder, tuple(files.records)


def find_latest(*paths: str, reads_files: bool = True) -> tuple[str, TrainState] | None:
    """Folder and state of the newest complete checkpoint whose files are intact, or None.

    A damaged checkpoint is skipped with a warning. If two paths have a checkpoint at the same number of images, the
    first path wins. If ``reads_files`` is False, the files are not checked.
    """
    folders = [
        (folder.rsplit("/", 1)[-1], -place, folder) for place, path in enumerate(paths) for folder in complete(path)
    ]
    for _, _, folder in sorted(folders, reverse=True):
        try:
            return folder, (_verified if reads_files else _manifest)(folder).state
        except DataError as error:
            warnings.warn(f"skipping a damaged checkpoint: {error}", stacklevel=2)
    return None


def newest_at_rate(path: str, rate: Callable[[int], float]) -> str | None:
    """Name of the newest complete checkpoint whose learning rate equals ``rate(images_seen)``, or None."""
    for folder in reversed(complete(path)):
        state = _manifest(folder).state
        if state.learning_rate is not None and math.isclose(state.learning_rate, rate(state.images_seen), rel_tol=1e-6):
            return folder.rsplit("/", 1)[-1]
    return None


def load(folder: str, engine: Engine, averages: WeightAverages, prime: Callable[[], object]) -> None:
    """Restore the engine and the averages from a complete checkpoint; all ranks must call.

    Args:
        folder: the checkpoint.
        engine: engine to restore.
        averages: averages to restore.
        prime: function that makes one training step on any batch, because DeepSpeed allocates the moments in the first
            step. The restored state then overwrites everything that this step changed.
    """
    prime()
    manifest = _manifest(folder)
    buffers, momenta = engine.buffers(), engine.momenta()
    for file, record in manifest.files.items():
        tensors = load_tensors(_content(folder, file, record))
        for name, value in _of_kind(tensors, "weight"):
            engine.set_master(name, value)
            engine.set_working_copy(name, value)
        for moment in MOMENTS:
            for name, value in _of_kind(tensors, moment):
                engine.set_moment(name, moment, value)
        for name, value in _of_kind(tensors, MOMENTUM):
            if name in momenta:
                momenta[name].copy_(value)
        for name, value in _of_kind(tensors, "buffer"):
            buffers[name].copy_(value)
        for half_life in averages.half_lives:
            averages.load(half_life, _of_kind(tensors, _average_kind(averages, half_life)))
    engine.set_num_steps(manifest.state.num_steps)
    barrier()


def complete(path: str) -> list[str]:
    """Folders of checkpoints with a manifest, oldest first."""
    folders = [storage.join(path, name) for name in storage.list_names(path) if name.startswith("images-")]
    return [folder for folder in folders if storage.exists(storage.join(folder, MANIFEST))]


def newest(path: str) -> str:
    """Folder of the newest checkpoint and SHA-256 of its manifest, for the registry; empty if there is none."""
    folders = complete(path)
    if not folders:
        return ""
    return f"{folders[-1]} {storage.digest(storage.read_bytes(storage.join(folders[-1], MANIFEST)))}"


def prune(path: str, config: CheckpointConfig) -> None:
    """Delete complete checkpoints except those that ``config`` keeps. Delete each manifest before the other files."""
    folders = complete(path)
    kept, first_of = set(folders[-config.keep_last :]), dict[int, str]()
    if config.keep_every_images is not None:
        for folder in folders:
            first_of.setdefault(int(folder.rsplit("-", 1)[-1]) // config.keep_every_images, folder)
        first_of.pop(0, None)
    for folder in folders:
        if folder not in kept and folder not in first_of.values():
            storage.remove(storage.join(folder, MANIFEST))
            storage.remove_tree(folder)


class _Files:
    """Writes this rank's files. After a failure it drops all tensors, but the rank can still take part in gathers."""

    def __init__(self, folder: str) -> None:
        self.records: dict[str, dict[str, Any]] = {}
        self.failure: str | None = None
        self._folder = folder
        self._tensors: dict[str, Tensor] = {}
        self._bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        self._tensors[name] = tensor.detach().to("cpu", copy=True).contiguous()
        self._bytes += tensor.numel() * tensor.element_size()
        if self._bytes >= _FILE_BYTES:
            self.flush()

    def flush(self) -> None:
        if self._tensors and self.failure is None:
            file = f"part-{rank():05d}-of-{world_size():05d}-{len(self.records):03d}.safetensors"
            content = save_tensors(self._tensors)
            try:
                storage.write_bytes(storage.join(self._folder, file), content)
                self.records[file] = {"sha256": storage.digest(content), "bytes": len(content)}
            except StorageError as error:
                self.failure = str(error)
        self._tensors, self._bytes = {}, 0


def _write_share(files: _Files, engine: Engine, averages: WeightAverages) -> None:
    """Gather all tensors together with the other ranks, and write this rank's share of them."""
    for i, name in enumerate(engine.names):
        mine = i % world_size() == rank()
        weight = engine.full_weight(name)
        if mine:
            files.add(f"weight/{name}", weight)
        for moment in MOMENTS if engine.has_moments(name) else ():
            full = engine.full_moment(name, moment)
            if mine:
                files.add(f"{moment}/{name}", full)
    momenta = engine.momenta()
    holders = gather(sorted(momenta))
    for name, momentum in momenta.items():
        if rank() == min(place for place, names in enumerate(holders) if name in names):
            files.add(f"{MOMENTUM}/{name}", momentum)
    for half_life in averages.half_lives:
        for i, (name, full) in enumerate(averages.full(half_life)):
            if i % world_size() == rank():
                files.add(f"{_average_kind(averages, half_life)}/{name}", full)
    if is_main():
        for name, buffer in engine.buffers().items():
            files.add(f"buffer/{name}", buffer)
    files.flush()


def _average_kind(averages: WeightAverages, half_life: int) -> str:
    return "average" if half_life == averages.half_lives[0] else f"average-{half_life}"


def _of_kind(tensors: dict[str, Tensor], kind: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one kind with their names, without the prefix ``kind/``, in the same order on all ranks."""
    prefix = f"{kind}/"
    return ((name.removeprefix(prefix), tensors[name]) for name in sorted(tensors) if name.startswith(prefix))


def _manifest(folder: str) -> CheckpointManifest:
    location = storage.join(folder, MANIFEST)
    return CheckpointManifest.from_json(storage.read_bytes(location), location, DataError)


def _verified(folder: str) -> CheckpointManifest:
    manifest = _manifest(folder)
    for file, record in manifest.files.items():
        _content(folder, file, record)
    return manifest


def _content(folder: str, file: str, record: FileRecord) -> bytes:
    """The bytes of a file, checked against the manifest."""
    location = storage.join(folder, file)
    if not storage.exists(location):
        raise DataError(f"{location} is missing, although its manifest lists it; delete the checkpoint")
    content = storage.read_bytes(location)
    if storage.digest(content) != record.sha256:
        raise DataError(f"{location} does not match its manifest (sha256 differs); delete the checkpoint")
    return content
