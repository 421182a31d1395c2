"""The state of a model, computed from the events of its log; a snapshot of the state avoids reading the whole log.

A snapshot is a cache. It is used only if its digest is correct and the log contains its last event; otherwise the log
is read from the start.
"""

from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from tarflow_scale import storage
from tarflow_scale.errors import RegistryError
from tarflow_scale.records import Calibration, MetricsReport, ModelVersion
from tarflow_scale.registry.log import Event

__all__ = ["Approval", "HistoryEntry", "ModelState", "resolve"]

_SNAPSHOT_FORMAT = b"tarflow-scale registry snapshot 2"


class _Plain(BaseModel):
    model_config = ConfigDict(frozen=True)


class HistoryEntry(_Plain):
    """An event of the log without its payload."""

    number: int
    kind: str
    time: str
    actor: str
    reason: str
    version: int | None
    """The version that the event is about; None if it is not about a single version."""


class Approval(_Plain):
    """A user's approval of a version for promotion."""

    user: str
    time: str
    reason: str


@dataclass
class ModelState:
    """State of a model after the events up to ``number``."""

    number: int = 0
    """Number of the newest event."""
    digest: str = ""
    """SHA-256 of the newest event."""
    versions: dict[int, ModelVersion] = field(default_factory=dict)
    reports: dict[int, list[MetricsReport]] = field(default_factory=dict)
    """Reports of each version, oldest first."""
    calibrations: dict[int, list[Calibration]] = field(default_factory=dict)
    """Decoding calibrations of each version, oldest first."""
    approvals: dict[int, list[Approval]] = field(default_factory=dict)
    aliases: dict[str, int] = field(default_factory=dict)
    holders: dict[str, list[int]] = field(default_factory=dict)
    """Versions of each alias: the current version is last, after the versions to which rollbacks can return."""
    guarded: dict[str, str] = field(default_factory=dict)
    """Name of the gate for each alias that a gate has moved; ``set_alias`` refuses these aliases."""
    retired: dict[int, str] = field(default_factory=dict)
    """Time of retirement of each retired version."""
    collected: dict[int, str] = field(default_factory=dict)
    """Time at which garbage collection deleted the files of each collected version."""
    history: list[HistoryEntry] = field(default_factory=list)
    """All events, oldest first."""

    def has_numbers(self, version: int, protocols: set[str]) -> bool:
        """Whether a version has a value for each of these protocol digests."""
        metrics = (metric for report in self.reports.get(version, []) for metric in report.metrics.values())
        return protocols <= {metric.protocol_digest for metric in metrics}

    def take(self, event: Event, digest: str) -> None:
        """Apply the next event.

        Raises:
            pydantic.ValidationError: this release of the package cannot read the payload.
        """
        payload, version_number = event.payload, event.payload.get("version")
        match event.kind:
            case "register":
                version = ModelVersion.model_validate(payload["version"])
                self.versions[version.version] = version
                version_number = version.version
            case "evaluate":
                report = MetricsReport.model_validate(payload["report"])
                self.reports.setdefault(report.version, []).append(report)
                version_number = report.version
            case "calibrate":
                self.calibrations.setdefault(payload["version"], []).append(Calibration.model_validate(payload["plan"]))
            case "approve":
                approval = Approval(user=payload["user"], time=event.time, reason=event.reason)
                self.approvals.setdefault(payload["version"], []).append(approval)
            case "promote" | "alias":
                self.aliases[payload["alias"]] = payload["version"]
                self.holders.setdefault(payload["alias"], []).append(payload["version"])
                if event.kind == "promote":
                    self.guarded[payload["alias"]] = payload["decision"].get("gate", "")
            case "rollback":
                self._go_back(payload["alias"], payload["version"])
            case "retire":
                self.retired[payload["version"]] = event.time
            case "collect":
                self.collected |= dict.fromkeys(payload["versions"], event.time)
        self.number, self.digest = event.number, digest
        fields = {name: getattr(event, name) for name in ("number", "kind", "time", "actor", "reason")}
        self.history.append(HistoryEntry(version=version_number, **fields))

    def _go_back(self, alias: str, version: int) -> None:
        self.aliases[alias] = version
        held = self.holders[alias]
        held.pop()
        while held and held[-1] != version:
            held.pop()

    def earlier(self, alias: str) -> int | None:
        """The version to which a rollback of ``alias`` would return, or None; retired versions are skipped."""
        usable = [held for held in self.holders[alias][:-1] if held not in self.retired]
        return usable[-1] if usable else None

    # -- snapshots -----------------------------------------------------------------------------------------------------

    def to_snapshot(self) -> bytes:
        """Content of a snapshot file, which `from_snapshot` reads."""
        body = _STATES.dump_json(self)
        return b"\n".join([_SNAPSHOT_FORMAT, storage.digest(body).encode(), body])

    @staticmethod
    def from_snapshot(content: bytes | None) -> "ModelState | None":
        """The state in a snapshot; None if the file is missing or damaged, or has another format."""
        if content is None:
            return None
        form, _, rest = content.partition(b"\n")
        digest, _, body = rest.partition(b"\n")
        if form != _SNAPSHOT_FORMAT or digest != storage.digest(body).encode():
            return None
        try:
            return _STATES.validate_json(body)
        except ValidationError:
            return None


_STATES: TypeAdapter[ModelState] = TypeAdapter(ModelState)


def resolve(state: ModelState, reference: int | str, model: str) -> ModelVersion:
    """The version with this number or alias; ``latest`` is the newest version that is not retired.

    Raises:
        RegistryError: there is no such version.
    """
    if reference == "latest":
        usable = [number for number in state.versions if number not in state.retired]
        if not usable:
            raise RegistryError(f"model {model!r} has no version yet; train a version first")
        return state.versions[max(usable)]
    if isinstance(reference, str) and not reference.isdecimal():
        if reference not in state.aliases:
            raise RegistryError(
                f"{model} has no alias {reference!r} (its aliases: {known(state.aliases)}); promote a version first, "
                f"or use another reference, such as latest"
            )
        return state.versions[state.aliases[reference]]
    number = int(reference)
    if number not in state.versions:
        raise RegistryError(
            f"{model} has no version {number} (its versions: {known(state.versions)}); check the number"
        )
    return state.versions[number]


def known(names: dict[Any, Any]) -> str:
    """Join names into a list for an error message."""
    return ", ".join(str(name) for name in names) or "none"
