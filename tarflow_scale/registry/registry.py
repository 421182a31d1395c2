"""One model of a registry: its versions and aliases, computed from an append-only log, and its files.

Events are the files ``<registry>/<model>/_log/000000000001.json ...``; ``_snapshot`` beside ``_log`` is a cache (see
`tarflow_scale.registry.state`). All other files are blobs, ``<registry>/blobs/sha256/<hex>``. A blob is written before
the event that names it, and verified at every read. Only safetensors and JSON are stored; nothing is unpickled.
"""

import random
import re
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from pydantic import ValidationError

from tarflow_scale import storage
from tarflow_scale.errors import AlreadyReported, RegistryError, StorageError
from tarflow_scale.records import Calibration, FileRecord, MetricsReport, ModelVersion
from tarflow_scale.registry.log import Event, EventLog, Kind, new_event, user
from tarflow_scale.registry.state import ModelState, known, resolve
from tarflow_scale.registry.store import Store

__all__ = ["Registry"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_ATTEMPTS = 200
_SNAPSHOT = "_snapshot"
_SNAPSHOT_EVERY = 50
"""Number of events between snapshots."""


class _Registered(Exception):
    """A version with the same files and configuration exists."""

    def __init__(self, version: ModelVersion) -> None:
        self.version = version


Decide = Callable[[ModelState], dict[str, Any]]


class Registry:
    """One model of a registry.

    Args:
        path: folder or URL of the registry.
        model: name of the model.

    Raises:
        RegistryError: the name has characters that are not allowed.
    """

    def __init__(self, path: str, model: str) -> None:
        self.path = path
        self.model = _checked(model, "the name of a model")
        self.store = Store(path)
        """The part of the registry that all models share."""
        self.log = EventLog(storage.join(path, model, "_log"))
        """The events of this model."""
        self._snapshot = storage.join(path, model, _SNAPSHOT)
        self._state = ModelState()
        self._saved = 0

    @staticmethod
    def models(path: str) -> list[str]:
        """Sorted names of the models of a registry.

        Raises:
            RegistryError: there is no registry at ``path``.
        """
        names = [name for name in storage.list_names(path) if _NAME.fullmatch(name) and _has_log(path, name)]
        if not names:
            raise RegistryError(f"no registry at {path}; finish a training run first, or check the path")
        return names

    # -- reading -------------------------------------------------------------------------------------------------------

    def state(self) -> ModelState:
        """The current state. Callers must not change it.

        Raises:
            RegistryError: the model does not exist, or its log is damaged.
        """
        state = self._refreshed()
        if not state.number:
            raise self._no_such_model()
        if state.number - self._saved >= _SNAPSHOT_EVERY:
            self._save_snapshot()
        return state

    def _no_such_model(self) -> RegistryError:
        try:
            models = ", ".join(Registry.models(self.path))
        except RegistryError as error:  # the registry has no model at all
            return error
        return RegistryError(
            f"no model {self.model!r} in the registry {self.path} (its models: {models}); check registry.model"
        )

    def replayed(self) -> ModelState:
        """Compute the state without a snapshot: read and check every event.

        Raises:
            RegistryError: the log is damaged, or ends before the newest snapshot.
        """
        self._state = ModelState()
        self._read_on(self._state)
        if not self._state.number:
            raise self._no_such_model()
        newest = ModelState.from_snapshot(storage.read_if_there(self._snapshot))
        if newest is not None and newest.number > self._state.number:
            raise RegistryError(
                f"{self.log.path} ends at event {self._state.number}, but a snapshot has {newest.number} events; "
                f"restore the log from a backup"
            )
        return self._state

    def resolve(self, reference: int | str) -> ModelVersion:
        """The version with this number or alias; ``latest`` is the newest version that is not retired.

        Raises:
            RegistryError: there is no such version.
        """
        return resolve(self.state(), reference, self.model)

    def read_files(self, version: ModelVersion) -> dict[str, bytes]:
        """Verified content of every file of a version.

        Raises:
            RegistryError: a blob is missing or does not match its digest, or garbage collection deleted the files.
        """
        when = self.state().collected.get(version.version)
        if when is not None:
            raise RegistryError(f"{self.model}@{version.version} was retired and its files were deleted on {when}")
        return {name: self.read(name, record) for name, record in version.files.items()}

    def read(self, name: str, record: FileRecord) -> bytes:
        """Read a blob and verify its digest; error messages call the blob ``name``.

        Raises:
            RegistryError: the blob is missing or does not match its digest.
        """
        return self.store.read(f"{name} of {self.model}", record)

    # -- writing -------------------------------------------------------------------------------------------------------

    def keep(self, content: bytes) -> FileRecord:
        """Store content as a blob, and return its record, which a report can contain."""
        return self.store.keep(content)

    def register(
        self, files: dict[str, bytes], fields: dict[str, Any], reason: str, configuration: bytes | None = None
    ) -> ModelVersion:
        """Store files as the next version; if an unretired version has the same files and settings, return it instead.

        Args:
            files: content by name.
            fields: the other fields of `ModelVersion`.
            reason: why the version is registered.
            configuration: the resolved configuration; ``fields`` contains its digest.
        """
        records = {name: self.store.keep(content) for name, content in files.items()}
        if configuration is not None:
            fields = fields | {"configuration": self.store.keep(configuration)}

        def decide(state: ModelState) -> dict[str, Any]:
            for version in state.versions.values():
                same = version.files == records and version.config_digest == fields["config_digest"]
                if same and version.version not in state.retired:
                    raise _Registered(version)
            new = ModelVersion.model_validate({"version": len(state.versions) + 1, "files": records, **fields})
            return {"version": new.model_dump(mode="json")}

        try:
            event = self.append("register", reason, decide)
        except _Registered as existing:
            return existing.version
        for content in [*files.values(), *([] if configuration is None else [configuration])]:
            self.store.keep(content)  # garbage collection may have deleted it before the event was written
        return ModelVersion.model_validate(event.payload["version"])

    def attach_report(self, report: MetricsReport, reason: str, once: bool = False) -> None:
        """Add a metrics report to its version.

        Args:
            report: the report.
            reason: why the version was evaluated.
            once: refuse the report if the version already has a value for each protocol of the report.

        Raises:
            AlreadyReported: ``once`` is set, and the version already has these values.
            RegistryError: the version does not exist or has other weights.
        """

        def decide(state: ModelState) -> dict[str, Any]:
            version = resolve(state, report.version, self.model)
            if once and state.has_numbers(version.version, {m.protocol_digest for m in report.metrics.values()}):
                raise AlreadyReported(
                    f"{self.model}@{version.version} was evaluated by another process; no report was added"
                )
            if version.weights_digest != report.weights_digest:
                raise RegistryError(
                    f"the report must be about the weights of {self.model}@{report.version} (got other weights); "
                    f"evaluate the version again"
                )
            return {"report": report.model_dump(mode="json")}

        self.append("evaluate", reason, decide)

    def attach_calibration(self, version: int, calibration: Calibration, reason: str) -> None:
        """Add a decoding calibration to a version.

        Raises:
            RegistryError: the version does not exist.
        """

        def decide(state: ModelState) -> dict[str, Any]:
            return {"version": resolve(state, version, self.model).version, "plan": calibration.model_dump(mode="json")}

        self.append("calibrate", reason, decide)

    def approve(self, version: int, reason: str) -> str:
        """Record that the current user approves a version for promotion. Returns the user.

        Raises:
            RegistryError: the version does not exist, is retired, or was approved by this user before.
        """
        name = user()

        def decide(state: ModelState) -> dict[str, Any]:
            self.check_usable(state, version)
            if any(approval.user == name for approval in state.approvals.get(version, [])):
                raise RegistryError(f"{self.model}@{version} was already approved by {name}")
            return {"version": version, "user": name}

        self.append("approve", reason, decide)
        return name

    def promote(self, alias: str, version: int, expected: int | None, decision: dict[str, Any], reason: str) -> None:
        """Move an alias and record the decision of its gate; the alias must still point to ``expected``.

        Raises:
            RegistryError: the alias does not point to ``expected``, or the version is retired.
        """
        self._move("promote", alias, version, expected, {"decision": decision}, reason)

    def set_alias(self, alias: str, version: int, expected: int | None, reason: str) -> None:
        """Move an alias that no gate guards; the alias must still point to ``expected``.

        Raises:
            RegistryError: a gate guards the alias, the alias does not point to ``expected``, or the version is retired.
        """
        self._move("alias", _checked(alias, "an alias"), version, expected, {}, reason)

    def rollback(self, alias: str, reason: str) -> tuple[int, int]:
        """Move an alias back to its newest previous version that is not retired. Returns ``(from, to)``.

        Raises:
            RegistryError: the alias does not exist or has no earlier version.
        """
        before = self.state()
        if alias not in before.aliases:
            raise RegistryError(f"{self.model} has no alias {alias!r} (it has {known(before.aliases)}); check the name")
        current = before.aliases[alias]

        def decide(state: ModelState) -> dict[str, Any]:
            self._check_unmoved(state, alias, current)
            earlier = state.earlier(alias)
            if earlier is None:
                raise RegistryError(f"alias {alias!r} of {self.model} has no earlier version to go back to")
            return {"alias": alias, "version": earlier, "expected": current}

        event = self.append("rollback", reason, decide)
        return current, int(event.payload["version"])

    def retire(self, version: int, reason: str) -> None:
        """Take a version out of use: aliases can no longer move to it, and garbage collection may delete its files.

        Raises:
            RegistryError: the version does not exist, has an alias, or is already retired.
        """

        def decide(state: ModelState) -> dict[str, Any]:
            self.check_usable(state, version)
            held = [alias for alias, number in state.aliases.items() if number == version]
            if held:
                raise RegistryError(
                    f"{self.model}@{version} must have no alias to be retired (got {', '.join(held)}); move the alias"
                )
            return {"version": version}

        self.append("retire", reason, decide)

    def append(self, kind: Kind, reason: str, decide: Decide) -> Event:
        """Append an event.

        Args:
            kind: kind of event.
            reason: reason for the event.
            decide: function that returns the payload for the current state. It is called again if another writer took
                the event number, and may raise an error if the event is no longer valid.
        """
        identity = uuid.uuid4().hex
        for attempt in range(_ATTEMPTS):
            state = self._refreshed()
            event = new_event(state.number + 1, kind, identity, reason, state.digest, decide(state))
            location, content = self.log.location(event.number), event.to_json()
            # The event may exist from an earlier attempt of this writer, if the response of the store was lost.
            if self.store.create(location, content) or storage.read_bytes(location) == content:
                if event.number - self._saved >= _SNAPSHOT_EVERY:
                    self._refreshed()
                    self._save_snapshot()
                return event
            time.sleep(random.uniform(0, min(attempt, 20) * 0.005))  # noqa: S311 - so that writers do not collide again
        raise RegistryError(f"{self.log.path} has too many concurrent writers ({_ATTEMPTS} attempts lost); try again")

    # -- internal ------------------------------------------------------------------------------------------------------

    def _move(
        self, kind: Kind, alias: str, version: int, expected: int | None, more: dict[str, Any], reason: str
    ) -> None:
        def decide(state: ModelState) -> dict[str, Any]:
            self._check_unmoved(state, alias, expected)
            self.check_usable(state, version)
            if kind == "alias" and alias in state.guarded:
                raise RegistryError(
                    f"alias {alias!r} of {self.model} is guarded by gate {state.guarded[alias] or '(unnamed)'}; move "
                    f"it with the verb promote"
                )
            return {"alias": alias, "version": version, "expected": expected, **more}

        self.append(kind, reason, decide)

    def check_usable(self, state: ModelState, version: int) -> None:
        """Check that a version exists in ``state`` and is not retired.

        Raises:
            RegistryError: the version does not exist or is retired.
        """
        resolve(state, version, self.model)
        if version in state.retired:
            raise RegistryError(f"{self.model}@{version} was retired on {state.retired[version]}; use another version")

    def _check_unmoved(self, state: ModelState, alias: str, expected: int | None) -> None:
        version = state.aliases.get(alias)
        if version != expected:
            raise RegistryError(
                f"another process moved alias {alias!r} of {self.model} (got {version}, not {expected}); try again"
            )

    def _refreshed(self) -> ModelState:
        """Read new events and return the state; the state is empty if there is no log."""
        if not self._state.number:
            self._state = self._from_snapshot() or ModelState()
            self._saved = self._state.number
        self._read_on(self._state)
        return self._state

    def _read_on(self, state: ModelState) -> None:
        try:
            for event, digest in self.log.after(state.number, state.digest):
                state.take(event, digest)
        except (ValidationError, KeyError) as error:
            self._state = ModelState()
            first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": error.args, "msg": "missing"}
            raise RegistryError(
                f"the log of {self.model} in {self.path} holds an event that cannot be read "
                f"({'.'.join(map(str, first['loc']))}: {first['msg']}); use the version of tarflow-scale that wrote it"
            ) from error
        except RegistryError:
            self._state = ModelState()
            raise

    def _from_snapshot(self) -> ModelState | None:
        state = ModelState.from_snapshot(storage.read_if_there(self._snapshot))
        if state is None or not state.number:
            return None
        newest = storage.read_if_there(self.log.location(state.number))
        return state if newest is not None and storage.digest(newest) == state.digest else None

    def _save_snapshot(self) -> None:
        self._saved = self._state.number
        with suppress(RegistryError, StorageError):  # only a cache; a user with read-only access works without it
            self.store.replace(self._snapshot, self._state.to_snapshot())


def _has_log(path: str, name: str) -> bool:
    """Whether there is a model with this name. True for an unreadable folder too, because it may be a model."""
    try:
        return storage.exists(storage.join(path, name, "_log"))
    except StorageError:
        return True


def _checked(name: str, noun: str) -> str:
    if not _NAME.fullmatch(name):
        raise RegistryError(f"{noun} must consist of letters, digits, dots, dashes and underscores (got {name!r})")
    return name
