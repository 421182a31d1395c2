"""The worker of ``generate``: make one shard from a range of images. Every worker makes the same bytes.

A worker stores the record of a shard, or compares it with an earlier record, then writes the shard and reads it back.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from tarflow_scale.loading import load_version, worker_device
from tarflow_scale.records import GenerationPlan
from tarflow_scale.sampling import Quality, Sampler, guarded
from tarflow_scale.shards.encoding import Encoder
from tarflow_scale.shards.events import VectorEvent, encode_array, event_of
from tarflow_scale.shards.images import CODECS
from tarflow_scale.shards.recorded import RecordedShards
from tarflow_scale.shards.writer import PackedShard, Sample

__all__ = ["ShardMaker", "ShardUnit", "read_quality", "recorded"]


@dataclass(frozen=True)
class ShardUnit:
    """One output shard: images ``[start, stop)``."""

    number: int
    start: int
    stop: int

    @property
    def num_images(self) -> int:
        """Number of images in the shard."""
        return self.stop - self.start

    @property
    def tar_name(self) -> str:
        """File name of the shard, for example ``generated-00000.tar``."""
        return f"generated-{self.number:05d}.tar"


class ShardMaker:
    """Holds the flow; makes one shard at a time.

    Args:
        registry: folder or URL of the registry.
        plan: the resolved plan.
        path: output folder or URL.
    """

    def __init__(self, registry: str, plan: GenerationPlan, path: str) -> None:
        torch.set_num_threads(plan.threads)
        self._flow = load_version(registry, plan.model, plan.version).to(worker_device(plan.device == "cuda"))
        self._plan = plan
        self._event = event_of(plan, plan.pixels.bit_depth)
        self._shards = recorded(path)
        rule = "balanced" if plan.labels == "none" else plan.labels
        self._sampler = Sampler(self._flow, plan.seed, plan.sampling, plan.decoding, rule)
        self._encoder = Encoder(plan.threads if plan.device == "cuda" else 1, plan.codec, plan.jpeg_quality)
        self._origin = {
            "model": f"{plan.model}@{plan.version}",
            "weights": plan.weights_digest,
            "seed": plan.seed,
            "sampling": plan.sampling.model_dump(mode="json"),
        }

    def run(self, unit: ShardUnit) -> tuple[Quality, float | None]:
        """Make a shard: store its record, write index and tar, and read both back.

        Returns:
            Counts of bad images, and the value of `Sampler.round_trip_error`, or None if another driver had already
            made the shard.

        Raises:
            PlanError: an earlier record has other digests, usually from another machine or library version.
            NumericsError: an image was bad at every attempt.
            StorageError: the stored shard has other bytes than the worker wrote.
        """
        if self._shards.is_done(unit.tar_name):
            return read_quality(self._shards, unit), None
        shard, quality = self._made(unit)
        self._shards.write(shard, quality.to_json())
        return quality, self._sampler.round_trip_error()

    def _made(self, unit: ShardUnit) -> tuple[PackedShard, Quality]:
        """Make the shard in memory. Image files are encoded while the flow decodes the next batch."""
        plan, quality = self._plan, Quality()
        drawn: list[tuple[int, int | None, int]] = []  # index, label and attempt of each sample

        def batches() -> Iterator[torch.Tensor]:
            nonlocal quality
            for batch in guarded(self._sampler, range(unit.start, unit.stop), plan.guard, self._event.level):
                quality = quality.plus(batch.quality)
                labels = self._sampler.labels(batch.indices)
                numbers = [None] * len(batch.indices) if labels is None else labels.tolist()
                drawn.extend(zip(batch.indices, numbers, batch.attempts, strict=True))
                yield batch.x

        samples = (self._sample(file, *drawn[row]) for row, file in enumerate(self._files(batches())))
        return PackedShard.of(unit.tar_name, samples, plan.codec), quality

    def _files(self, batches: Iterator[torch.Tensor]) -> Iterator[bytes]:
        if isinstance(self._event, VectorEvent):
            return (encode_array(vector) for x in batches for vector in x.float().cpu().numpy())
        return self._encoder.encoded(self._flow.stored(x).cpu().numpy() for x in batches)

    def _sample(self, file: bytes, index: int, label: int | None, attempt: int) -> Sample:
        about: dict[str, Any] = {"index": index, "label": label, **self._origin}
        if attempt:
            about["attempt"] = attempt
        codec = self._event.codec(self._plan.codec)
        return Sample(key=f"{index:09d}", image={CODECS.get(codec, codec): file}, label=label, metadata=about)


def recorded(path: str) -> RecordedShards:
    """The shards of an output folder; the note of each shard is its `Quality`."""
    return RecordedShards(path, "quality")


def read_quality(shards: RecordedShards, unit: ShardUnit) -> Quality:
    """Counts of bad images in a finished shard; the counts are zero if the file with them is missing."""
    content = shards.note(unit.tar_name)
    return Quality(images=unit.num_images) if content is None else Quality.from_json(content, unit.tar_name)
