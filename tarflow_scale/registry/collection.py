"""Garbage collection: find and delete blobs that no version needs.

A version needs every blob that its events name, until it has been retired for longer than the grace period. A blob that
no event names comes from an upload that was not completed; it is deleted when it is older than the grace period. All
models of a registry share its blobs, so all logs are read.

A ``collect`` event is written before the blobs of a version are deleted; if the collector is killed, the next one
deletes the rest. A writer that reuses an old blob writes the blob again before its event (`Store.keep`), which resets
the age of the blob. The collector checks this age just before it deletes the blob. After its event, `Registry.register`
calls `Store.keep` again, in case the blob was deleted before the event was written.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime

from tarflow_scale import storage
from tarflow_scale.errors import RegistryError
from tarflow_scale.records import FileRecord
from tarflow_scale.registry.registry import Registry
from tarflow_scale.registry.state import ModelState
from tarflow_scale.registry.store import FRESH_SECONDS, Store

__all__ = ["Garbage", "collect", "garbage", "named_by"]


@dataclass
class Garbage:
    """Versions and blobs that may be deleted."""

    versions: dict[str, list[int]] = field(default_factory=dict)
    """Numbers of retired versions, by model."""
    blobs: dict[str, int] = field(default_factory=dict)
    """Size of each blob in bytes, by digest."""


def garbage(path: str, grace_seconds: float) -> Garbage:
    """Find the versions and blobs that may be deleted from a registry now.

    Raises:
        RegistryError: there is no registry, a log is damaged, or the grace period is too short for running writers.
    """
    if grace_seconds < 2 * FRESH_SECONDS:
        raise RegistryError(
            f"the grace period must be at least {2 * FRESH_SECONDS / 3600:g} hours (got {grace_seconds / 3600:g}); "
            f"raise command.grace_days"
        )
    result, needed = Garbage(), set[str]()
    now = time.time()
    for model in Registry.models(path):
        state = Registry(path, model).state()
        for version in state.versions:
            since = state.retired.get(version)
            expired = since is not None and now - datetime.fromisoformat(since).timestamp() > grace_seconds
            if not expired or version in state.aliases.values():
                needed.update(record.sha256 for _, record in named_by(state, version))
            elif version not in state.collected:
                result.versions.setdefault(model, []).append(version)
    store = Store(path)
    for digest, num_bytes in store.blobs().items():
        if digest not in needed and _is_older(store.blob(digest), grace_seconds):
            result.blobs[digest] = num_bytes
    return result


def collect(path: str, unneeded: Garbage, grace_seconds: float, reason: str) -> int:
    """Record the deletion in the logs, then delete the blobs. Returns the number of bytes freed.

    Raises:
        RegistryError: a version to collect is not retired.
    """
    for model, versions in unneeded.versions.items():

        def decide(state: ModelState, versions: list[int] = versions) -> dict[str, list[int]]:
            if not set(versions) <= set(state.retired):
                raise RegistryError(
                    "the files of a version can be deleted only while it is retired; run 'models collect' again"
                )
            return {"versions": versions}

        Registry(path, model).append("collect", reason, decide)
    store, freed = Store(path), 0
    for digest, num_bytes in unneeded.blobs.items():
        if _is_older(store.blob(digest), grace_seconds):
            storage.remove(store.blob(digest))
            freed += num_bytes
    return freed


def named_by(state: ModelState, version: int) -> Iterator[tuple[str, FileRecord]]:
    """Yield ``(description, record)`` for every blob that is named in the events of a version."""
    record = state.versions[version]
    yield from record.files.items()
    if record.configuration is not None:
        yield "configuration", record.configuration
    for report in state.reports.get(version, []):
        if report.grid is not None:
            yield "the sample grid of a report", report.grid
        for name, metric in report.metrics.items():
            if metric.per_image is not None:
                yield f"the file of {name} per image", metric.per_image


def _is_older(location: str, seconds: float) -> bool:
    written = storage.modified_seconds(location)
    return written is not None and time.time() - written > seconds
