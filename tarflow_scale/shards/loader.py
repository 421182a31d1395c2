"""Load the batches for training.

Every slot of the global batch is a stream of samples (`tarflow_scale.shards.order`). A rank owns consecutive slots, and
divides them among its worker processes. A batch consists of the next sample of every slot, in the order of the slots.
So the content of a global batch does not depend on the number of ranks or workers. Each byte is read once per epoch.

A stream holds the stored bytes of its current block. If the data set is at a URL, threads read the next blocks ahead.
The current block and the blocks ahead together have at most as many samples as two full blocks. So one block is
usually read ahead, but several short blocks are read ahead at the end of an epoch and the start of the next.

A corrupt sample is replaced by the next sample in the manifest's order, on every rank and after every restart.
"""

import signal
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, repeat
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from tarflow_scale import storage
from tarflow_scale.config.data import DataConfig
from tarflow_scale.errors import DataError, UserError
from tarflow_scale.runtime.processes import die_with_parent, ignore_stop_signals, stop_signals_held
from tarflow_scale.shards.mix import Mix, MixPart, line_of
from tarflow_scale.shards.order import SlotWalk, steps_per_epoch
from tarflow_scale.shards.quarantine import Quarantine
from tarflow_scale.shards.reader import Batch, CorruptSample, StoredSample
from tarflow_scale.shards.ring import SharedRing

__all__ = ["Loader"]

_MAX_SUCCESSORS = 100
"""Number of consecutive corrupt samples at which the run stops."""
_REMOTE_THREADS = 16
"""Default number of read threads per process for a URL; local files are read without threads."""
_PREFETCH_BATCHES = 2
"""Number of batches that each worker process prepares in advance."""


@dataclass(frozen=True)
class _Block:
    """A block of one slot.

    Args:
        epoch: number of the epoch.
        runs: ranges of its samples: ``(shard number, first index in the shard, last index + 1)``.
        order: indices of its samples in reading order, without samples before the step at which reading starts.
    """

    epoch: int
    runs: list[tuple[int, int, int]]
    order: list[int]

    @property
    def num_samples(self) -> int:
        """Number of samples in memory after the block was read."""
        return sum(stop - start for _, start, stop in self.runs)


@dataclass(frozen=True)
class Loader:
    """Loads the batches of one rank, which contain the samples of the rank's slots in each global batch.

    Args:
        mix: the data sets.
        slots: this rank's slots.
        config: settings for reading.
        seed: seed of augmentation.
        quarantine_path: local file that lists corrupt samples; None writes no list.
        pin_memory: put images in page-locked memory, so that copies to a GPU overlap with computation.
    """

    mix: Mix
    slots: range
    config: DataConfig
    seed: int
    quarantine_path: str | None = None
    pin_memory: bool = False

    def batches(self, images_seen: int) -> Generator[Batch]:
        """Yield batches endlessly, starting with the global batch that follows the first ``images_seen`` images.

        Each batch has ``len(slots)`` samples; the memory order of its images is NHWC. After a restart, at most one
        block per slot is read a second time. Close the generator to stop its workers.

        Raises:
            DataError: too many consecutive samples are corrupt, a shard cannot be read, or a worker died.
        """
        step = images_seen // self.mix.num_slots
        if self.config.num_workers == 0:
            yield from self._own_batches(step)
        else:
            yield from self._worker_batches(step)

    def first(self) -> Batch:
        """The first batch of the run, read in this process."""
        with closing(self._own_batches(0)) as batches:
            return next(batches)

    def _own_batches(self, step: int, buffers: Iterator[NDArray[np.uint8]] | None = None) -> Generator[Batch]:
        """Yield batches that this process reads; images are written to new memory, or to the given buffers."""
        shape = self._image_shape(len(self.slots))
        buffers = buffers or (_empty_images(shape, self.pin_memory) for _ in repeat(None))
        quarantine = Quarantine(self.quarantine_path)
        threads = self.config.read_threads
        if threads is None:
            threads = _REMOTE_THREADS if any(storage.is_remote(part.shards.path) for part in self.mix.parts) else 0
        pool = ThreadPoolExecutor(threads, "read-ahead") if threads else None
        try:
            streams = [_SlotStream(*self.mix.part_of(slot), step, pool) for slot in self.slots]
            while True:
                yield self._collate([next(stream) for stream in streams], quarantine, next(buffers))
        finally:
            if pool is not None:
                pool.shutdown(wait=False, cancel_futures=True)

    def _collate(
        self, taken: list[tuple[MixPart, StoredSample, int]], quarantine: Quarantine, images: NDArray[np.uint8]
    ) -> Batch:
        event, replaced = self.mix.manifest.event, 0
        rows: list[tuple[int, int, int]] = []
        for pixels, (part, stored, epoch) in zip(images, taken, strict=True):
            image, label, number = _decode_or_replace(part, stored, quarantine)
            replaced += number != stored.number
            number += part.first_sample
            pixels[:] = event.augment(image, self.config.augmentation, self.seed, epoch, number)
            rows.append((label, number, epoch))
        labels, samples, epochs = np.array(rows, dtype=np.int64).T.copy()
        events, conditions = event.unpack(images)
        return Batch(events, labels, samples, epochs, replaced, conditions, self.mix.manifest.latents)

    def _worker_batches(self, step: int) -> Generator[Batch]:
        workers = min(self.config.num_workers, len(self.slots))
        num, channels, height, width = self._image_shape(len(self.slots))
        with closing(SharedRing((workers, _PREFETCH_BATCHES + 1, -(-num // workers), height, width, channels))) as ring:
            loader = DataLoader(
                _WorkerDataSet(self, step, workers, ring),
                batch_size=None,
                collate_fn=_unchanged,
                num_workers=workers,
                prefetch_factor=_PREFETCH_BATCHES,
                # A fork would copy locks that threads of stores and of torch hold. Workers of a fork server would
                # outlive a rank that is killed: they end with their parent, which would be the server.
                multiprocessing_context="spawn",
                worker_init_fn=_start_worker,
            )
            with stop_signals_held():
                items = iter(loader)
            # DataLoader's handler would raise wherever the rank is when a worker dies; `_part` reports it instead.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            while True:
                parts = [self._part(items) for _ in range(workers)]
                images = _empty_images((num, channels, height, width), self.pin_memory)
                arrays = [ring.arrays[i, part.buffer, : len(part.labels)] for i, part in enumerate(parts)]
                np.concatenate(arrays, out=images.transpose(0, 2, 3, 1))
                events, conditions = self.mix.manifest.event.unpack(images)
                yield Batch(
                    events=events,
                    labels=np.concatenate([part.labels for part in parts]),
                    samples=np.concatenate([part.samples for part in parts]),
                    epochs=np.concatenate([part.epochs for part in parts]),
                    num_replaced=sum(part.num_replaced for part in parts),
                    conditions=conditions,
                    latents=self.mix.manifest.latents,
                )

    def _image_shape(self, num: int) -> tuple[int, int, int, int]:
        return num, *self.mix.manifest.event.augmented_shape(self.config.augmentation)

    @staticmethod
    def _part(items: Iterator[Any]) -> "_Part":
        try:
            part = next(items)
        except (RuntimeError, OSError, EOFError) as error:
            if isinstance(error, RuntimeError) and "worker" not in str(error):
                raise
            reason = str(error).splitlines()[0].rstrip(".")
            raise DataError(
                f"a loader process died ({reason}), perhaps because memory ran out; lower data.num_workers"
            ) from error
        if isinstance(part, UserError):
            raise part
        return part


def _empty_images(shape: tuple[int, ...], pinned: bool) -> NDArray[np.uint8]:
    """An uninitialized array ``(B, C, H, W)``. Its memory order is ``(B, H, W, C)``, like the output of decoders."""
    num, channels, height, width = shape
    memory = torch.empty((num, height, width, channels), dtype=torch.uint8, pin_memory=pinned)
    return memory.numpy().transpose(0, 3, 1, 2)


@dataclass(frozen=True)
class _Part:
    """One worker's part of a batch. Its images are in a shared buffer that is overwritten three parts later."""

    buffer: int
    labels: NDArray[np.int64]
    samples: NDArray[np.int64]
    epochs: NDArray[np.int64]
    num_replaced: int


def _start_worker(_: int) -> None:
    """Ignore stop signals. Launchers send them to workers too, but the rank stops its workers after it has saved."""
    ignore_stop_signals()
    die_with_parent()


def _unchanged(item: Any) -> Any:
    return item


class _WorkerDataSet(IterableDataset[Any]):
    """Yields the batch parts that one worker process of a `Loader` reads, or the error that ends the worker."""

    def __init__(self, loader: Loader, step: int, workers: int, ring: SharedRing) -> None:
        self._loader = loader
        self._step = step
        self._workers = workers
        self._ring = ring

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        assert info is not None
        slots = np.array_split(np.arange(self._loader.slots.start, self._loader.slots.stop), self._workers)[info.id]
        own = replace(self._loader, slots=range(int(slots[0]), int(slots[-1]) + 1), pin_memory=False)
        buffers = self._ring.arrays[info.id, :, : len(slots)].transpose(0, 1, 4, 2, 3)
        try:
            batches = own._own_batches(self._step, cycle(buffers))  # pyright: ignore[reportPrivateUsage]
            for buffer, batch in zip(cycle(range(len(buffers))), batches, strict=False):
                yield _Part(buffer, batch.labels, batch.samples, batch.epochs, batch.num_replaced)
        except UserError as error:
            yield error  # as a value, because DataLoader would wrap it in its traceback


class _SlotStream:
    """Yields the samples of one slot endlessly from ``step`` on; queues the first blocks when it is created."""

    def __init__(self, part: MixPart, slot: int, step: int, pool: ThreadPoolExecutor | None) -> None:
        self._part = part
        self._pool = pool
        self._blocks = _blocks(part, slot, step)
        self._due = next(self._blocks)
        self._ahead: deque[tuple[_Block, Callable[[], list[StoredSample]]]] = deque()
        self._read_ahead(0)
        self._samples = self._walk()

    def __next__(self) -> tuple[MixPart, StoredSample, int]:
        return next(self._samples)

    def _walk(self) -> Iterator[tuple[MixPart, StoredSample, int]]:
        while True:
            block, samples_of = self._ahead.popleft()
            stored = samples_of()
            self._read_ahead(block.num_samples)
            for place in block.order:
                yield self._part, stored[place], block.epoch

    def _read_ahead(self, held: int) -> None:
        """Queue at least one block, and more if ``held`` plus all queued samples stay within two full blocks."""
        held += sum(block.num_samples for block, _ in self._ahead)
        while not self._ahead or held + self._due.num_samples <= 2 * self._part.spec.shuffle_block:
            read = partial(self._read, self._due)
            self._ahead.append((self._due, read if self._pool is None else self._pool.submit(read).result))
            held += self._due.num_samples
            self._due = next(self._blocks)

    def _read(self, block: _Block) -> list[StoredSample]:
        return [sample for run in block.runs for sample in self._part.shards.read_run(*run)]


def _blocks(part: MixPart, slot: int, step: int) -> Iterator[_Block]:
    """Yield the blocks of a slot, epoch after epoch, from the block that contains ``step``."""
    epoch, start = divmod(step, steps_per_epoch(part.spec))
    while True:
        walk, line = SlotWalk(part.spec, epoch, slot), line_of(part.spec, epoch)
        first = walk.block_at(start)
        for block in range(first, len(walk.block_lengths)):
            low, high = walk.block_range(block)
            skip = start - int(walk.visit_starts[first]) if block == first else 0
            yield _Block(epoch, line.runs(low, high), walk.block_order(block)[skip:].tolist())
        epoch, start = epoch + 1, 0


def _decode_or_replace(
    part: MixPart, stored: StoredSample, quarantine: Quarantine
) -> tuple[NDArray[np.uint8], int, int]:
    """Image, label and number of a sample, or of the next good sample in the manifest's order.

    Raises:
        DataError: too many consecutive samples are corrupt.
    """
    for _ in range(_MAX_SUCCESSORS):
        try:
            return *part.shards.decode(stored), stored.number
        except CorruptSample as fault:
            quarantine.add(fault)
            successor = (stored.number + 1) % part.spec.num_samples
            stored = part.shards.read(np.array([successor]))[0]
    raise DataError(f"{_MAX_SUCCESSORS} samples in a row are corrupt (up to {stored.origin}); restore the data set")
