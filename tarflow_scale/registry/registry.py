"""Models, versions and aliases, as the fold of an append-only log; files as content-addressed blobs.

Layout: ``<registry>/<model>/_log/000000000001.json ...`` and ``<registry>/blobs/sha256/<hex>``. Blobs are written
before the event that names them, and verified whenever they are read. Only safetensors and JSON are stored; nothing
is ever unpickled.
"""

from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from tarflow_scale import storage
from tarflow_scale.errors import AlreadyReported, RegistryError
from tarflow_scale.records import DecodingPlan, FileRecord, MetricsReport, ModelVersion
from tarflow_scale.registry.log import Event, EventLog

__all__ = ["ModelState", "Registry"]

_BLOBS = "blobs"


@dataclass(frozen=True)
class ModelState:
    """What the log of a model amounts to."""

    versions: dict[int, ModelVersion] = field(default_factory=dict)
    reports: dict[int, list[MetricsReport]] = field(default_factory=dict)
    """Reports of each version, oldest first."""
    plans: dict[int, list[DecodingPlan]] = field(default_factory=dict)
    """Decoding plans of each version, oldest first."""
    aliases: dict[str, int] = field(default_factory=dict)
    holders: dict[str, list[int]] = field(default_factory=dict)
    """For each alias the versions that an undo would go back through, the present one last."""
    events: list[Event] = field(default_factory=list)

    def has_numbers(self, version: int, protocols: set[str]) -> bool:
        """Whether a version has a number by each of these protocols, named by their digests."""
        metrics = (metric for report in self.reports.get(version, []) for metric in report.metrics.values())
        return protocols <= {metric.protocol_digest for metric in metrics}

    @classmethod
    def fold(cls, events: list[Event]) -> "ModelState":
        """The state after ``events``."""
        state = cls(events=events)
        for event in events:
            payload = event.payload
            match event.kind:
                case "register":
                    version = ModelVersion.model_validate(payload["version"])
                    state.versions[version.version] = version
                case "evaluate":
                    report = MetricsReport.model_validate(payload["report"])
                    state.reports.setdefault(report.version, []).append(report)
                case "calibrate":
                    plan = DecodingPlan.model_validate(payload["plan"])
                    state.plans.setdefault(payload["version"], []).append(plan)
                case "promote":
                    state.aliases[payload["alias"]] = payload["version"]
                    state.holders.setdefault(payload["alias"], []).append(payload["version"])
                case "rollback":
                    state.aliases[payload["alias"]] = payload["version"]
                    state.holders[payload["alias"]].pop()
        return state


class Registry:
    """One model of a registry.

    Args:
        path: folder or URL of the registry.
        model: name of the model.
    """

    def __init__(self, path: str, model: str) -> None:
        self.path = path
        self.model = model
        self._log = EventLog(storage.join(path, model, "_log"))

    @staticmethod
    def models(path: str) -> list[str]:
        """Names of the models of a registry.

        Raises:
            RegistryError: when there is none at ``path``.
        """
        names = [name for name in storage.list_names(path) if storage.exists(storage.join(path, name, "_log"))]
        if not names:
            raise RegistryError(f"no registry at {path}; train a model into it first, or check registry.path")
        return names

    def state(self) -> ModelState:
        """The present state.

        Raises:
            RegistryError: when there is no such model.
        """
        events = self._log.read()
        if not events:
            raise RegistryError(f"no model {self.model!r} in the registry {self.path}; check registry.model")
        try:
            return ModelState.fold(events)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise RegistryError(
                f"the log of {self.model} in {self.path} holds an event that cannot be read ({where}: {first['msg']}); "
                f"use the version of this package that wrote it"
            ) from error

    def resolve(self, reference: int | str) -> ModelVersion:
        """The version that a number, an alias or ``latest`` names.

        Raises:
            RegistryError: when it does not exist.
        """
        return resolve(self.state(), reference, self.model)

    def register(self, files: dict[str, bytes], facts: dict[str, Any], reason: str) -> ModelVersion:
        """Store files and make them the next version; the very same files and facts are not registered twice.

        Args:
            files: content by name.
            facts: the other fields of `ModelVersion`.
            reason: why.
        """
        records = {name: self.store(content) for name, content in files.items()}

        def decide(events: list[Event]) -> dict[str, Any]:
            version = len(ModelState.fold(events).versions) + 1
            record = ModelVersion.model_validate({"version": version, "files": records, **facts})
            return {"version": record.model_dump(mode="json")}

        if storage.exists(storage.join(self.path, self.model, "_log")):
            for version in ModelState.fold(self._log.read()).versions.values():
                if version.files == records and version.config_digest == facts["config_digest"]:
                    return version
        event = self._log.append("register", reason, decide)
        return ModelVersion.model_validate(event.payload["version"])

    def attach_report(self, report: MetricsReport, reason: str, once: bool = False) -> None:
        """Add a report to the version it is about.

        Args:
            report: the report.
            reason: why.
            once: refuse where all its protocols have a number of this version already.

        Raises:
            AlreadyReported: they have.
            RegistryError: when the version does not exist or holds other weights.
        """

        def decide(events: list[Event]) -> dict[str, Any]:
            state = ModelState.fold(events)
            version = resolve(state, report.version, self.model)
            if once and state.has_numbers(version.version, {m.protocol_digest for m in report.metrics.values()}):
                raise AlreadyReported(f"{self.model}@{version.version} has been scored by another; nothing was added")
            if version.weights_digest != report.weights_digest:
                raise RegistryError(
                    f"the report is about other weights than {self.model}@{report.version}; evaluate again"
                )
            return {"report": report.model_dump(mode="json")}

        self._log.append("evaluate", reason, decide)

    def attach_plan(self, version: int, plan: DecodingPlan, reason: str) -> None:
        """Add a decoding plan to the version it was measured on.

        Raises:
            RegistryError: when the version does not exist.
        """

        def decide(events: list[Event]) -> dict[str, Any]:
            known = resolve(ModelState.fold(events), version, self.model)
            return {"version": known.version, "plan": plan.model_dump(mode="json")}

        self._log.append("calibrate", reason, decide)

    def promote(self, alias: str, version: int, expected: int | None, decision: dict[str, Any], reason: str) -> None:
        """Move an alias, if it still points to ``expected``.

        Raises:
            RegistryError: when it moved meanwhile.
        """

        def decide(events: list[Event]) -> dict[str, Any]:
            self._check_unmoved(ModelState.fold(events), alias, expected)
            return {"alias": alias, "version": version, "expected": expected, "decision": decision}

        self._log.append("promote", reason, decide)

    def rollback(self, alias: str, reason: str) -> tuple[int, int]:
        """Point an alias back to the version before; returns (from, to).

        Raises:
            RegistryError: when the alias does not exist or has no earlier version.
        """
        before = self.state()
        if alias not in before.aliases:
            raise RegistryError(f"no alias {alias!r} of {self.model} (got {_known(before.aliases)}); check the name")
        current = before.aliases[alias]

        def decide(events: list[Event]) -> dict[str, Any]:
            state = ModelState.fold(events)
            self._check_unmoved(state, alias, current)
            if len(state.holders[alias]) < 2:
                raise RegistryError(f"alias {alias!r} of {self.model} has no earlier version to go back to")
            return {"alias": alias, "version": state.holders[alias][-2], "expected": current}

        event = self._log.append("rollback", reason, decide)
        return current, int(event.payload["version"])

    def read_files(self, version: ModelVersion) -> dict[str, bytes]:
        """Content of every file of a version, verified.

        Raises:
            RegistryError: when a blob is missing or is not what its digest says.
        """
        return {name: self.read(name, record) for name, record in version.files.items()}

    def read(self, name: str, record: FileRecord) -> bytes:
        """What `store` kept, verified; ``name`` is for the error.

        Raises:
            RegistryError: missing, or not what the digest says.
        """
        location = self._blob(record)
        if not storage.exists(location):
            raise RegistryError(f"{name} of {self.model} is missing from the registry ({location}); restore the blob")
        content = storage.read_bytes(location)
        if storage.digest(content) != record.sha256:
            raise RegistryError(f"{name} of {self.model} does not match its digest ({location}); restore the blob")
        return content

    def store(self, content: bytes) -> FileRecord:
        """Keep content under its digest; an event may name it from here on."""
        record = FileRecord(sha256=storage.digest(content), bytes=len(content))
        location = self._blob(record)
        if not storage.exists(location):
            storage.write_bytes(location, content)
        return record

    def _blob(self, record: FileRecord) -> str:
        return storage.join(self.path, _BLOBS, "sha256", record.sha256)

    def _check_unmoved(self, state: ModelState, alias: str, expected: int | None) -> None:
        found = state.aliases.get(alias)
        if found != expected:
            raise RegistryError(
                f"alias {alias!r} of {self.model} moved meanwhile (got {found}, not {expected}); look again"
            )


def resolve(state: ModelState, reference: int | str, model: str) -> ModelVersion:
    """The version of ``state`` that a number, an alias or ``latest`` names.

    Raises:
        RegistryError: when it does not exist.
    """
    if reference == "latest":
        if not state.versions:
            raise RegistryError(f"model {model!r} has no version yet; train one")
        return state.versions[max(state.versions)]
    if isinstance(reference, str) and not reference.isdigit():
        if reference not in state.aliases:
            raise RegistryError(f"no alias {reference!r} of {model} (there is {_known(state.aliases)}); check the name")
        return state.versions[state.aliases[reference]]
    number = int(reference)
    if number not in state.versions:
        raise RegistryError(f"no version {number} of {model} (there are {_known(state.versions)}); check the number")
    return state.versions[number]


def _known(names: dict[Any, Any]) -> str:
    return ", ".join(str(name) for name in names) or "none"
