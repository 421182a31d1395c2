"""Checks of places that jobs read and write: disk of the run folder, data sets, stores, weights of extractors."""

import os
import shutil
import time
import uuid
from collections.abc import Callable

from tarflow_scale import storage
from tarflow_scale.config.autoencoder import TunedDecoderConfig
from tarflow_scale.config.data import DataConfig
from tarflow_scale.config.doctor import CheckedMetricsConfig
from tarflow_scale.config.protocols import load_protocol
from tarflow_scale.config.train import CheckpointConfig, LoggingConfig, TrainedConfig, TrainingConfig
from tarflow_scale.errors import RegistryError, StorageError, UserError
from tarflow_scale.registry import Registry, Store
from tarflow_scale.verbs.doctor.finding import Finding, failed, from_message, ok, skipped, warning
from tarflow_scale.verbs.doctor.machine import nearest

__all__ = ["data_set", "disk", "registry", "store", "trial_folder", "weights", "writable_registry"]

_GIB, _MB = 1024**3, 1e6
_LEAST_BYTES = _GIB
"""Free space that the run folder needs if the configuration describes no run."""
_SMALL_BYTES, _LARGE_BYTES = 1024**2, 32 * 1024**2
_QUICK_SECONDS = 0.5
"""If writing the small file takes longer than this, the store is slow, and the large file is not written."""
_PROBE_KEYS = 20
_SKEW_SECONDS = 60.0
"""Largest accepted clock difference. A larger one makes file ages wrong; from 15 minutes on, S3 refuses requests."""


def disk(
    logging: LoggingConfig | None,
    data: DataConfig | None,
    model: TrainedConfig | None,
    training: TrainingConfig | None,
    checkpoint: CheckpointConfig | None,
) -> list[Finding]:
    """Compare the free space at the run folder with the size of checkpoints, or with 1 GiB if no run is configured."""
    place = nearest(storage.local(logging.path if logging else "."))
    free = shutil.disk_usage(place).free
    needed, reason = _LEAST_BYTES, "or more"
    if data is not None and model is not None and training is not None and checkpoint is not None:
        needed, reason = _checkpoint_bytes(data, model, training, checkpoint)
    space = f"{_in_gib(free)} free at {place}, and a run needs {_in_gib(needed)} {reason}"
    if free < needed:
        return [failed("disk", space, "free space, choose another logging.path, or keep fewer checkpoints")]
    return [ok("disk", space)]


def _checkpoint_bytes(
    data: DataConfig, model: TrainedConfig, training: TrainingConfig, checkpoint: CheckpointConfig
) -> tuple[int, str]:
    """Size of all checkpoints that a run keeps, and a text that explains it."""
    from tarflow_scale.shards.manifest import read_manifest

    try:
        manifest = read_manifest(data.path)
    except UserError:
        return _LEAST_BYTES, "or more (the size of a checkpoint is known once data.path is a data set)"
    if isinstance(model, TunedDecoderConfig):
        return _LEAST_BYTES, "or more (the registry knows the size of the decoder)"

    from tarflow_scale.training.construction import seen_by_model, size_of

    seen = seen_by_model(manifest, data.augmentation.crop_pixels)
    num_parameters = size_of(model, seen.event.shape, seen.num_classes or None, seen.event.num_conditions).parameters
    # fp32 weights, two moments of the optimizer, and the moving averages
    each = 4 * num_parameters * (3 + len(training.ema_half_life_images))
    kept = checkpoint.keep_last + 1  # the newest is complete before the oldest is removed
    if checkpoint.keep_every_images is not None:
        kept += training.total_images // checkpoint.keep_every_images
    return kept * each, f"for {kept} checkpoints of {num_parameters:,} parameters"


def data_set(key: str, path: str) -> list[Finding]:
    """Check that the manifest can be read, and that the first shard has the recorded size."""
    from tarflow_scale.shards.manifest import read_manifest  # here: numpy starts threads, and checks are forks

    manifest = read_manifest(path)
    first = manifest.shards[0]
    size = storage.size_bytes(storage.join(path, first.file))
    if size != first.bytes:
        difference = f"{key}={path}: {first.file} has {size} bytes, and its manifest says {first.bytes}"
        return [failed("data", difference, "restore the shard or pack the data set again")]
    return [ok("data", f"{key}={path}: {manifest.num_images:,} {manifest.event}")]


def trial_folder(path: str) -> str:
    """Path of a new folder in ``path``. If ``path`` is a missing local folder, use its nearest existing parent."""
    place = path if storage.is_remote(path) else str(nearest(storage.local(path)))
    return storage.join(place, f".doctor-{uuid.uuid4().hex}")


def store(key: str, path: str, folder: str) -> list[Finding]:
    """Check a store: write, read and list files, create files concurrently, measure the speed and compare the clocks.

    Args:
        key: key of the configuration.
        path: value of the key.
        folder: folder for test files, from `trial_folder`. The check removes it at the end; if the check is killed, the
            caller must remove it.
    """
    try:
        written, read = _speeds(folder)
        mark = storage.join(folder, "clock")
        before = time.time()
        storage.write_bytes(mark, b"now")
        stamped = storage.modified_seconds(mark)
        skew = 0.0 if stamped is None or before - 1 <= stamped <= time.time() + 1 else stamped - before
        names = storage.list_names(folder)
        if "clock" not in names:
            return [
                failed(
                    "store", f"{key}={path} does not list a file that was just written ({names})", "use another store"
                )
            ]
        winners = _one_winner(path, folder)
    finally:
        storage.remove_tree(folder)
    if winners is not None:
        return [winners]
    speed = f"{key}={path}: writes {written / _MB:.0f} MB/s, reads {read / _MB:.0f} MB/s, safe for concurrent writers"
    if abs(skew) > _SKEW_SECONDS:
        return [
            warning(
                "store",
                f"{speed}; its clock is {skew:+.0f} s from the clock of this machine",
                "synchronize both with NTP",
            )
        ]
    return [ok("store", speed)]


def registry(path: str) -> list[Finding]:
    """Check that a registry can be read, for a job that only reads it."""
    models = Registry.models(path)
    return [ok("store", f"registry.path={path}: {len(models)} model{'s' * (len(models) != 1)} can be read")]


def writable_registry(path: str, look: Callable[[], list[Finding]]) -> list[Finding]:
    """Check that a registry can be written. If it can only be read, return a warning, because some jobs only read it.

    Args:
        path: path of the registry.
        look: a function that calls `store` for the path.
    """
    try:
        return look()
    except StorageError as error:
        try:
            readable = registry(path)[0].found
        except UserError:
            raise error from None
        reason = from_message("store", str(error)).found
        advice = "generate, score and models list only read; for other verbs, get permission to write there"
        return [warning("store", f"{readable} but not written ({reason})", advice)]


def _speeds(folder: str) -> tuple[float, float]:
    """Measure the speed of writing and reading a file, in bytes per second."""
    location, size = storage.join(folder, "bytes"), _SMALL_BYTES
    while True:
        content = os.urandom(size)
        started = time.perf_counter()
        storage.write_bytes(location, content)
        writing = time.perf_counter() - started
        if size == _LARGE_BYTES or writing > _QUICK_SECONDS:
            break
        size = _LARGE_BYTES
    started = time.perf_counter()
    back = storage.read_bytes(location)
    reading = time.perf_counter() - started
    if back != content:
        raise StorageError(
            f"{location} must contain what was written to it (got {len(back)} different bytes); use another store"
        )
    return size / writing, size / reading


def _one_winner(path: str, folder: str) -> Finding | None:
    marker = Store(path).marker()
    if marker is not None and marker.single_writer:  # promised when the registry was made
        return None
    try:
        Store(folder).probe(_PROBE_KEYS)
    except RegistryError as error:
        return from_message("store", str(error).replace(folder, path))
    return None


def weights(config: CheckedMetricsConfig | None) -> list[Finding]:
    """Check that the weights of feature extractors exist and have the required SHA-256."""
    protocols = [load_protocol(path) for path in config.protocols] if config else []
    named = [protocol for protocol in protocols if getattr(protocol, "extractor", "pixels") != "pixels"]
    given = config.extractor_weights if config else {}
    if not named and not given:
        return [skipped("weights", "metrics.protocols and metrics.extractor_weights are not set")]
    from tarflow_scale.metrics.features import published_digest, weights_digest

    digests: dict[str, str] = {}
    for protocol in named:
        digests[protocol.extractor] = weights_digest(protocol, given)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    for name in given:
        digests[name] = digests.get(name) or published_digest(name, given)
    return [ok("weights", ", ".join(f"{name} {digest[:12]}" for name, digest in sorted(digests.items())))]


def _in_gib(num_bytes: float) -> str:
    return f"{num_bytes / _GIB:.1f} GiB"
