"""Whether a version may become champion: a pure function of a gate and of reports, with every reason spelt out."""

from dataclasses import dataclass

from tarflow_scale.config import BitsPerDimProtocol, GateConfig, Requirement, SampledProtocol
from tarflow_scale.errors import RegistryError
from tarflow_scale.records import MetricsReport, MetricValue, Record

__all__ = ["Contender", "Decision", "Reason", "decide"]


class Reason(Record):
    """One requirement, and whether it holds."""

    requirement: str
    found: str
    holds: bool


class Decision(Record):
    """The outcome of a gate."""

    gate: str
    promoted: bool
    reasons: tuple[Reason, ...]


@dataclass(frozen=True)
class Contender:
    """A version with its reports, oldest first."""

    name: str
    reports: list[MetricsReport]

    def value(
        self, protocol: BitsPerDimProtocol | SampledProtocol, protocol_id: str | None = None
    ) -> MetricValue | None:
        """The newest number by this protocol, and with this id if one is given."""
        found = [
            metric
            for report in self.reports
            for metric in report.metrics.values()
            if metric.protocol_digest == protocol.digest and protocol_id in (None, metric.protocol_id)
        ]
        return found[-1] if found else None


def decide(
    gate: GateConfig,
    protocols: dict[str, BitsPerDimProtocol | SampledProtocol],
    candidate: Contender,
    champion: Contender | None,
) -> Decision:
    """Compare a candidate with a gate and with the champion.

    Args:
        gate: the requirements.
        protocols: protocol files of the requirements, by path.
        candidate: who wants the alias.
        champion: who has it, or None.

    Raises:
        RegistryError: when the candidate has no number by a protocol that the gate requires.
    """
    reasons: list[Reason] = []
    for requirement in gate.requirements:
        protocol = protocols[requirement.protocol]
        value = candidate.value(protocol, requirement.protocol_id)
        if value is None:
            raise RegistryError(_nothing_by(protocol.name, candidate))
        reasons.extend(_judge(requirement, protocol, value, candidate, champion))
    return Decision(gate=gate.name, promoted=all(reason.holds for reason in reasons), reasons=tuple(reasons))


def _nothing_by(protocol: str, candidate: Contender) -> str:
    if not candidate.reports:
        return f"{candidate.name} has no report (the gate asks for {protocol}); run 'tarflow-scale evaluate' first"
    others = sorted({metric.protocol for report in candidate.reports for metric in report.metrics.values()})
    return (
        f"{candidate.name} has no number by this protocol {protocol} (its reports: {', '.join(others)}, perhaps an "
        f"earlier edition); run 'tarflow-scale evaluate' with it"
    )


def _judge(
    requirement: Requirement,
    protocol: BitsPerDimProtocol | SampledProtocol,
    value: MetricValue,
    candidate: Contender,
    champion: Contender | None,
) -> list[Reason]:
    name, reasons = protocol.name, []
    if requirement.maximum is not None:
        holds = value.value <= requirement.maximum
        wanted = f"{name} <= {requirement.maximum:g} {value.unit}"
        reasons.append(Reason(requirement=wanted, found=f"{value.value:.4f}", holds=holds))
    if requirement.must_beat_champion:
        wanted = f"{name} < champion's" + (f" - {requirement.margin:g}" if requirement.margin else "")
        reasons.append(_against_champion(wanted, protocol, value, requirement.margin, candidate, champion))
    return reasons


def _against_champion(
    wanted: str,
    protocol: BitsPerDimProtocol | SampledProtocol,
    value: MetricValue,
    margin: float,
    candidate: Contender,
    champion: Contender | None,
) -> Reason:
    if champion is None:
        return Reason(requirement=wanted, found="there is no champion yet", holds=True)
    if champion.name == candidate.name:
        return Reason(requirement=wanted, found="it is the champion", holds=True)
    best = champion.value(protocol, value.protocol_id)
    if best is None:
        found = f"{champion.name} has no number with the same protocol id; evaluate it on the same reference"
        return Reason(requirement=wanted, found=found, holds=False)
    holds = value.value < best.value - margin
    return Reason(
        requirement=wanted, found=f"{value.value:.4f} against {best.value:.4f} of {champion.name}", holds=holds
    )
