"""The worker of ``encode``: one shard of images becomes one shard of latents, with the same samples in the same order.

Images are encoded in batches of one size, the last filled up, so the bytes of a shard depend on its images, the
autoencoder, the batch size and the machine, not on the worker.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tarflow_scale.autoencoders.contract import from_stored
from tarflow_scale.config.encode import EncodingConfig
from tarflow_scale.errors import NumericsError
from tarflow_scale.loading import load_autoencoder, worker_device
from tarflow_scale.records import LatentFacts, Record
from tarflow_scale.shards.events import LatentEvent
from tarflow_scale.shards.reader import ShardSet, StoredSample
from tarflow_scale.shards.recorded import RecordedShards
from tarflow_scale.shards.writer import PackedShard, Sample

__all__ = ["ChannelSums", "EncodedUnit", "ShardEncoder", "recorded"]


@dataclass(frozen=True)
class EncodedUnit:
    """A shard to encode.

    Args:
        images: folder or URL of the split of images.
        latents: folder or URL of the split of latents.
        shard: number of the shard in the manifest of the images.
        tar_name: name of the shard.
        num_images: number of its images.
    """

    images: str
    latents: str
    shard: int
    tar_name: str
    num_images: int


class ChannelSums(Record):
    """Sums over the latents of a shard, for each channel, in float64."""

    num: int
    """Number of values of a channel."""
    total: tuple[float, ...]
    """Sums of draws from the latents: of their means."""
    squares: tuple[float, ...]
    """Sums of the expected squares of draws: squared mean plus variance."""


def recorded(path: str) -> RecordedShards:
    """The shards of a split of latents; the note of each is its `ChannelSums`."""
    return RecordedShards(path, "sums")


class ShardEncoder:
    """Holds the autoencoder; encodes one shard at a time.

    Args:
        registry: folder or URL of the registry.
        model: name of the autoencoder.
        version: its version.
        encoding: the section.
        facts: the latents; mean and scale are not used.
        threads: torch threads.
        gpu: whether this worker was given a GPU.
    """

    def __init__(
        self,
        registry: str,
        model: str,
        version: int,
        encoding: EncodingConfig,
        facts: LatentFacts,
        threads: int,
        gpu: bool,
    ) -> None:
        torch.set_num_threads(threads)
        self._device = worker_device(gpu)
        self._autoencoder = load_autoencoder(registry, model, version)[0].to(self._device)
        self._encoding = encoding
        self._event = LatentEvent(facts)
        self._origin = {"autoencoder": f"{model}@{version}", "digest": facts.autoencoder}

    def run(self, unit: EncodedUnit) -> None:
        """Encode a shard and write it with its sums.

        Raises:
            PlanError: the shard was encoded before with other bytes.
            NumericsError: a latent is not finite, or too large for the type.
            DataError: an image is corrupt.
        """
        shards = recorded(unit.latents)
        if shards.is_done(unit.tar_name):
            return
        source = ShardSet(unit.images)
        stored = source.read_run(unit.shard, 0, unit.num_images)
        sums = _Totals(self._event.shape[0])
        samples = self._samples(source, stored, sums)
        shards.write(PackedShard.of(unit.tar_name, samples), sums.record().to_json())

    def _samples(self, source: ShardSet, stored: list[StoredSample], sums: "_Totals") -> Iterator[Sample]:
        size = self._encoding.batch_size
        for low in range(0, len(stored), size):
            part = stored[low : low + size]
            batch = source.decoded(part)
            x = from_stored(torch.from_numpy(np.ascontiguousarray(batch.events)))
            moments = [self._moments(x)]
            sums.add(moments[0], self._event.facts.has_variance)
            if self._encoding.mirrored:
                moments.append(self._moments(x.flip(-1)))
            numbers = [self._as_stored(array) for array in moments]
            for row, sample in enumerate(part):
                carried = np.concatenate([array[row].reshape(-1).view(np.uint8) for array in numbers])[None, None]
                label = int(batch.labels[row]) if source.manifest.num_classes else None
                about: dict[str, Any] = {"origin": source.origin_of(sample), **self._origin}
                yield Sample(sample.key, self._event.content(carried), label, about)

    @torch.no_grad()
    def _moments(self, x: Tensor) -> Tensor:
        """Moments ``(B, n C, h, w)`` of images, in a batch of the full size."""
        filled = torch.cat([x, x[-1:].expand(self._encoding.batch_size - len(x), -1, -1, -1)])
        mean, log_var = self._autoencoder.encode(filled.to(self._device))
        moments = mean if log_var is None else torch.cat([mean, log_var], dim=1)
        return moments[: len(x)].float().cpu()

    def _as_stored(self, moments: Tensor) -> NDArray[Any]:
        """Moments as they are stored.

        Raises:
            NumericsError: a number is not finite.
        """
        typed = moments.to(getattr(torch, self._encoding.dtype))
        if not bool(torch.isfinite(typed).all()):
            raise NumericsError(
                f"latents must be finite numbers of type {self._encoding.dtype} (got others); use another autoencoder, "
                f"or encoding.dtype=bfloat16"
            )
        bits = typed.view(torch.uint16) if typed.dtype == torch.bfloat16 else typed
        return np.ascontiguousarray(bits.numpy())


class _Totals:
    def __init__(self, channels: int) -> None:
        self._num = 0
        self._total, self._squares = np.zeros(channels), np.zeros(channels)

    def add(self, moments: Tensor, has_variance: bool) -> None:
        numbers = moments.double()
        mean, log_var = numbers.chunk(2, dim=1) if has_variance else (numbers, None)
        variance = log_var.exp() if log_var is not None else torch.zeros_like(mean)
        self._num += mean[:, 0].numel()
        self._total += mean.sum(dim=(0, 2, 3)).numpy()
        self._squares += (mean.square() + variance).sum(dim=(0, 2, 3)).numpy()

    def record(self) -> ChannelSums:
        return ChannelSums(num=self._num, total=tuple(self._total.tolist()), squares=tuple(self._squares.tolist()))
