"""What a worker of ``generate`` does: a range of images to one shard, the same bytes whoever makes it.

What a shard will be is recorded, by whoever is first, before it is written; what is written is read back.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tarflow_scale import storage
from tarflow_scale.config.sampling import GuardConfig, SamplingConfig
from tarflow_scale.errors import PlanError, StorageError
from tarflow_scale.loading import load_version, worker_device
from tarflow_scale.records import GenerationPlan
from tarflow_scale.sampling import Quality, Sampler, guarded
from tarflow_scale.shards.encoding import Encoder
from tarflow_scale.shards.images import CODECS
from tarflow_scale.shards.manifest import ShardRecord, index_name
from tarflow_scale.shards.vectors import VALUES, encode_vector
from tarflow_scale.shards.writer import PackedShard, Sample

__all__ = ["UNIT_FOLDERS", "ShardMaker", "ShardUnit", "is_done", "read_quality", "read_record"]

UNIT_FOLDERS = _RECORDS, _QUALITY = "records", "quality"
"""Where a file a shard is written, beside the shards."""


@dataclass(frozen=True)
class ShardUnit:
    """One output shard: images ``[start, stop)``."""

    number: int
    start: int
    stop: int

    @property
    def tar_name(self) -> str:
        """``generated-00000.tar``."""
        return f"generated-{self.number:05d}.tar"


class ShardMaker:
    """Holds the flow; makes one shard at a time.

    Args:
        registry: folder or URL of the registry.
        plan: the plan.
        path: output folder or URL.
    """

    def __init__(self, registry: str, plan: GenerationPlan, path: str) -> None:
        torch.set_num_threads(plan.threads)
        flow = load_version(registry, plan.model, plan.version).to(worker_device(plan.device == "cuda"))
        self._plan = plan
        self._path = path
        rule = "balanced" if plan.labels == "none" else plan.labels
        self._sampler = Sampler(flow, plan.seed, SamplingConfig.model_validate(plan.sampling), plan.decoding, rule)
        self._flow = flow
        self._encoder = Encoder(plan.threads if plan.device == "cuda" else 1, plan.codec, plan.jpeg_quality)

    def run(self, unit: ShardUnit) -> tuple[Quality, float | None]:
        """Make a shard: first the record of what it will be, then index and tar, which are read back.

        Returns what was wrong with images, and `Sampler.round_trip_error`; nothing is made that another driver made.

        Raises:
            PlanError: a record from before names other bytes, so this is another machine or library version.
            NumericsError: an image was bad at every attempt.
            StorageError: what was written reads otherwise.
        """
        if is_done(self._path, unit):
            return read_quality(self._path, unit), None
        shard, quality = self._made(unit)
        storage.write_bytes(_quality_location(self._path, unit), quality.to_json())
        if not storage.create(_record_location(self._path, unit), shard.record.to_json()):
            earlier = read_record(self._path, unit)
            if earlier != shard.record:
                raise PlanError(
                    f"{unit.tar_name} came out with other bytes than before (sha256 {shard.record.sha256[:12]}, not "
                    f"{earlier.sha256[:12]}); use the package versions and device of the first run, or another "
                    f"shards.path"
                )
        shard.write(self._path)
        if not is_done(self._path, unit):
            raise StorageError(f"{self._path}/{unit.tar_name} reads otherwise than it was written; check the disk")
        return quality, self._sampler.round_trip_error()

    def _made(self, unit: ShardUnit) -> tuple[PackedShard, Quality]:
        """The shard in memory; images are encoded while the next are decoded."""
        plan, quality = self._plan, Quality()
        guard = GuardConfig.model_validate(plan.guard)
        level = math.inf if plan.is_of_vectors else 2 / (2**plan.pixels.bit_depth - 1)  # these are never out of range
        facts: list[tuple[int, int | None, int]] = []

        def batches() -> Iterator[torch.Tensor]:
            nonlocal quality
            for batch in guarded(self._sampler, range(unit.start, unit.stop), guard, level):
                quality = quality.plus(batch.quality)
                labels = self._sampler.labels(batch.indices)
                numbers = [None] * len(batch.indices) if labels is None else labels.tolist()
                facts.extend(zip(batch.indices, numbers, batch.attempts, strict=True))
                yield batch.x

        files = enumerate(self._files(batches()))
        samples = (self._sample(file, *facts[number]) for number, file in files)
        return PackedShard.of(unit.tar_name, samples, plan.codec), quality

    def _files(self, batches: Iterator[torch.Tensor]) -> Iterator[bytes]:
        if self._plan.is_of_vectors:
            return (encode_vector(one) for x in batches for one in x.float().cpu().numpy())
        return self._encoder.encoded(self._flow.stored(x).cpu().numpy() for x in batches)

    def _sample(self, file: bytes, index: int, label: int | None, attempt: int) -> Sample:
        plan = self._plan
        facts = {
            "index": index,
            "label": label,
            "model": f"{plan.model}@{plan.version}",
            "weights": plan.weights_digest,
            "seed": plan.seed,
            "sampling": plan.sampling,
        }
        if attempt:
            facts["attempt"] = attempt
        extension = VALUES if plan.is_of_vectors else CODECS[plan.codec]
        return Sample(key=f"{index:09d}", image={extension: file}, label=label, metadata=facts)


def _record_location(path: str, unit: ShardUnit) -> str:
    return storage.join(path, _RECORDS, unit.tar_name.removesuffix(".tar") + ".json")


def read_record(path: str, unit: ShardUnit) -> ShardRecord:
    """What a shard is, or will be."""
    location = _record_location(path, unit)
    return ShardRecord.from_json(storage.read_bytes(location), location)


def _quality_location(path: str, unit: ShardUnit) -> str:
    return storage.join(path, _QUALITY, unit.tar_name.removesuffix(".tar") + ".json")


def read_quality(path: str, unit: ShardUnit) -> Quality:
    """What was wrong with the images of a finished shard; nothing is known of those of early versions."""
    location = _quality_location(path, unit)
    content = storage.read_if_there(location)
    return Quality(images=unit.stop - unit.start) if content is None else Quality.from_json(content, location)


def is_done(path: str, unit: ShardUnit) -> bool:
    """Whether record, tar and index are there and are what the record says."""
    tar, index = storage.join(path, unit.tar_name), storage.join(path, index_name(unit.tar_name))
    if not all(map(storage.exists, (_record_location(path, unit), tar, index))):
        return False
    record = read_record(path, unit)
    return _digest(tar) == record.sha256 and _digest(index) == record.index_sha256


def _digest(location: str) -> str:
    with storage.local_copy(location) as copy:
        return storage.digest(copy)
