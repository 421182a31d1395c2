"""What no version needs any more, and its removal.

A blob is needed while some event of a version that is not retired names it, and of a retired one until the grace
period is over. What no event names is left of an upload that never became a version; it goes when it is older than the
grace period. Blobs are shared by all models of a registry, so all logs are read.

Before a blob of a version is removed, a ``collect`` event says so; a collector that dies leaves nothing worse than
blobs that the next one removes. A writer who names an old blob again writes it again (`Store.keep`), which makes it
young, and looks once more after its event; a blob's age is looked at just before it is removed.
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
    """What may go."""

    versions: dict[str, list[int]] = field(default_factory=dict)
    """Retired versions by model."""
    blobs: dict[str, int] = field(default_factory=dict)
    """Bytes of each blob."""


def garbage(path: str, grace_seconds: float) -> Garbage:
    """What may be removed of a registry now.

    Raises:
        RegistryError: there is none, or a log is damaged; a grace period that is shorter than what keeps writers safe.
    """
    if grace_seconds < 2 * FRESH_SECONDS:
        raise RegistryError(f"the grace period must be at least {2 * FRESH_SECONDS / 3600:g} hours; raise it")
    found, needed = Garbage(), set[str]()
    now = time.time()
    for model in Registry.models(path):
        state = Registry(path, model).state()
        for version in state.versions:
            since = state.retired.get(version)
            expired = since is not None and now - datetime.fromisoformat(since).timestamp() > grace_seconds
            if not expired or version in state.aliases.values():
                needed.update(record.sha256 for _, record in named_by(state, version))
            elif version not in state.collected:
                found.versions.setdefault(model, []).append(version)
    store = Store(path)
    for digest, num_bytes in store.blobs().items():
        if digest not in needed and _is_older(store.blob(digest), grace_seconds):
            found.blobs[digest] = num_bytes
    return found


def collect(path: str, found: Garbage, grace_seconds: float, reason: str) -> int:
    """Say in the logs what goes, and remove it; returns the bytes that came free.

    Raises:
        RegistryError: a version is not retired any more, which no event can bring about.
    """
    for model, versions in found.versions.items():

        def decide(state: ModelState, versions: list[int] = versions) -> dict[str, list[int]]:
            if not set(versions) <= set(state.retired):
                raise RegistryError("a version that was to be collected is not retired; run collect again")
            return {"versions": versions}

        Registry(path, model).append("collect", reason, decide)
    store, free = Store(path), 0
    for digest, num_bytes in found.blobs.items():
        if _is_older(store.blob(digest), grace_seconds):
            storage.remove(store.blob(digest))
            free += num_bytes
    return free


def named_by(state: ModelState, version: int) -> Iterator[tuple[str, FileRecord]]:
    """Every blob that events of a version name, with what it is."""
    record = state.versions[version]
    yield from record.files.items()
    if record.configuration is not None:
        yield "configuration", record.configuration
    for report in state.reports.get(version, []):
        if report.grid is not None:
            yield "samples of a report", report.grid
        for name, metric in report.metrics.items():
            if metric.per_image is not None:
                yield f"{name} of each image", metric.per_image


def _is_older(location: str, seconds: float) -> bool:
    written = storage.modified_seconds(location)
    return written is not None and time.time() - written > seconds
