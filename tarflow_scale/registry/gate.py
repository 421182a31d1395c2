"""Decide whether a version may be promoted. The decision depends only on the gate and on records of the registry.

A candidate must beat the champion by more than chance: the lower one-sided confidence limit of the improvement must
exceed the margin. Bits/dim are compared image by image, so the error is the standard error of the mean difference over
images, which is much smaller than the error of either mean. Metrics of samples, such as FID, are compared as
independent numbers, each with its jackknife error. A candidate can also be required to beat a version of another model
in the same way; both must be trained on the same data set.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import ge, le
from statistics import NormalDist, fmean, stdev

from tarflow_scale.config.protocols import GateConfig, PerImageProtocol, Requirement, SampledProtocol
from tarflow_scale.records import DataSetFacts, MetricsReport, MetricValue, Record
from tarflow_scale.registry.registry import Registry
from tarflow_scale.registry.state import ModelState

__all__ = ["Contender", "Decision", "Reason", "Rival", "decide", "lead", "read_contender"]

Protocol = PerImageProtocol | SampledProtocol


class Reason(Record):
    """One requirement of a gate, the value of the candidate (``found``), and whether the requirement holds."""

    requirement: str
    found: str
    holds: bool


class Rival(Record):
    """A version of another model with which the candidate was compared."""

    name: str
    """``model@version``."""
    weights_digest: str


class Decision(Record):
    """The decision of a gate, as stored in the log."""

    gate: str
    promoted: bool
    reasons: tuple[Reason, ...]
    against: Rival | None = None


@dataclass(frozen=True)
class Contender:
    """A version that takes part in a comparison.

    Args:
        name: ``model@version``.
        reports: metrics reports of the version, oldest first.
        approvals: users who approved the version.
        per_image: content of each file of per-image values, by SHA-256: sorted pairs ``(image digest, value)``.
        data: training data of the version.
        weights_digest: digest of the files of the version.
    """

    name: str
    reports: list[MetricsReport]
    approvals: tuple[str, ...] = ()
    per_image: Mapping[str, Sequence[tuple[bytes, float]]] = field(default_factory=dict)
    data: DataSetFacts | None = None
    weights_digest: str = ""

    def value(self, protocol: Protocol, protocol_id: str | None = None) -> MetricValue | None:
        """The newest value for this protocol (and this protocol id, if one is given); None if there is no value."""
        values = [
            metric
            for report in self.reports
            for metric in report.metrics.values()
            if metric.protocol_digest == protocol.digest and protocol_id in (None, metric.protocol_id)
        ]
        return values[-1] if values else None

    def of_images(self, metric: MetricValue) -> Sequence[tuple[bytes, float]]:
        """The per-image values that were averaged to ``metric``; empty if they were not stored."""
        return () if metric.per_image is None else self.per_image.get(metric.per_image.sha256, ())


def read_contender(registry: Registry, state: ModelState, version: int) -> Contender:
    """Read a version with its reports, approvals and per-image values.

    Raises:
        RegistryError: a file is missing or damaged.
    """
    reports = state.reports.get(version, [])
    stored = {
        metric.per_image.sha256: metric.per_image
        for report in reports
        for metric in report.metrics.values()
        if metric.per_image is not None
    }
    per_image: dict[str, list[tuple[bytes, float]]] = {}
    for digest, record in stored.items():
        from safetensors.numpy import load as load_arrays  # imported here, because most versions do not need NumPy

        arrays = load_arrays(registry.read("the file of values per image", record))
        images = arrays.pop("image_sha256")
        (costs,) = arrays.values()
        pairs = zip(images, costs, strict=True)
        per_image[digest] = sorted((image.tobytes(), float(cost)) for image, cost in pairs)
    approvals = tuple(approval.user for approval in state.approvals.get(version, []))
    data, weights = state.versions[version].data, state.versions[version].weights_digest
    return Contender(f"{registry.model}@{version}", reports, approvals, per_image, data, weights)


def decide(
    gate: GateConfig,
    protocols: dict[str, Protocol],
    candidate: Contender,
    champion: Contender | None,
    rival: Contender | None = None,
) -> Decision:
    """Check whether a candidate meets a gate's requirements, which may include beating the champion and a rival.

    Args:
        gate: the requirements.
        protocols: protocols of the requirements, by path of the protocol file.
        candidate: the version to be promoted.
        champion: the version that has the alias now, or None.
        rival: version of another model that the candidate must also beat, or None.
    """
    reasons = [] if rival is None else [_same_data(candidate, rival)]
    comparable = rival if reasons and reasons[0].holds else None
    for requirement in gate.requirements:
        protocol = protocols[requirement.protocol]
        value = candidate.value(protocol, requirement.protocol_id)
        if value is None:
            wanted = f"a number by protocol {protocol.name}"
            reasons.append(Reason(requirement=wanted, found=_without_number(candidate), holds=False))
            continue
        reasons.extend(_bounds(requirement, protocol, value))
        if requirement.must_beat_champion:
            reasons.append(_against(requirement, protocol, value, candidate, champion, "the champion's"))
            if comparable is not None:
                reasons.append(_against(requirement, protocol, value, candidate, comparable, f"{comparable.name}'s"))
    for name in gate.approvals:
        approvers = ", ".join(candidate.approvals) or "nobody"
        wanted = f"approved by {name}"
        reasons.append(Reason(requirement=wanted, found=f"by {approvers}", holds=name in candidate.approvals))
    return Decision(
        gate=gate.name,
        promoted=all(reason.holds for reason in reasons),
        reasons=tuple(reasons),
        against=None if rival is None else Rival(name=rival.name, weights_digest=rival.weights_digest),
    )


def _same_data(candidate: Contender, rival: Contender) -> Reason:
    """Check the requirement that both versions were trained on the same data set."""
    ours, theirs = _in_words(candidate.data), _in_words(rival.data)
    same = candidate.data is not None and rival.data is not None and candidate.data.digest == rival.data.digest
    data = ours if same else f"{ours}, not {theirs}"
    return Reason(requirement=f"trained on the data set of {rival.name}", found=data, holds=same)


def _in_words(data: DataSetFacts | None) -> str:
    if data is None:
        return "an unknown data set"
    return f"{data.name}/{data.split} {data.digest[:12]} with {data.num_classes} classes"


def _without_number(candidate: Contender) -> str:
    if not candidate.reports:
        return "the version has no report; run 'tarflow-scale evaluate' first"
    names = ", ".join(sorted({metric.protocol for report in candidate.reports for metric in report.metrics.values()}))
    return (
        f"the version has reports only by other protocols, or by an earlier edition of this protocol ({names}); run "
        f"'tarflow-scale evaluate' with this protocol"
    )


def _bounds(requirement: Requirement, protocol: Protocol, value: MetricValue) -> list[Reason]:
    name, unit, reasons = protocol.name, value.unit, list[Reason]()
    if requirement.minimum_images is not None:
        wanted = f"{name} on at least {requirement.minimum_images} images"
        holds = value.num_images >= requirement.minimum_images
        reasons.append(Reason(requirement=wanted, found=f"{value.num_images}", holds=holds))
    for bound, sign, holds_at in ((requirement.maximum, "<=", le), (requirement.minimum, ">=", ge)):
        if bound is not None:
            wanted, holds = f"{name} {sign} {bound:g} {unit}", holds_at(value.value, bound)
            reasons.append(Reason(requirement=wanted, found=f"{value.value:.4f}", holds=holds))
    return reasons


def _against(
    requirement: Requirement,
    protocol: Protocol,
    value: MetricValue,
    candidate: Contender,
    other: Contender | None,
    whose: str,
) -> Reason:
    """Check that the candidate beats ``other``. ``whose`` is the possessive of ``other``, as in ``the champion's``."""
    better = "above" if protocol.higher_is_better else "below"
    by = f" by more than {requirement.margin:g}" if requirement.margin else ""
    wanted = f"{protocol.name} {better} {whose}{by}, with {100 * requirement.confidence:g}% confidence"

    def reason(found: str, holds: bool) -> Reason:
        return Reason(requirement=wanted, found=found, holds=holds)

    if other is None:
        return reason("there is no champion yet", True)
    if other.name == candidate.name:
        return reason("the version is already the champion", True)
    best = other.value(protocol, value.protocol_id)
    if best is None:
        return reason(f"{other.name} has no number with the same protocol id; evaluate it on the same reference", False)
    gain, error, how = lead(protocol, candidate, value, other, best)
    comparison = f"{value.value:.4f} against {best.value:.4f} of {other.name}"
    if error is None:
        return reason(f"{comparison}, but without standard errors; evaluate both versions again", False)
    limit = gain - NormalDist().inv_cdf(requirement.confidence) * error
    return reason(f"{comparison}: better by {gain:.4f} ± {error:.4f}, compared {how}", limit > requirement.margin)


def lead(
    protocol: Protocol, candidate: Contender, value: MetricValue, champion: Contender, best: MetricValue
) -> tuple[float, float | None, str]:
    """Compare the numbers of two versions.

    Args:
        protocol: protocol of both numbers; it defines whether higher is better.
        candidate: the version that is compared.
        value: number of the candidate.
        champion: the version that the candidate is compared with.
        best: number of the champion, with the same protocol id.

    Returns:
        The improvement of the candidate over the champion; the standard error of the improvement, or None if unknown;
        and how the error was computed: ``image by image``, ``as independent numbers``, or empty if unknown.
    """
    sign = -1 if protocol.higher_is_better else 1
    ours, theirs = candidate.of_images(value), champion.of_images(best)
    if len(ours) > 1 and [image for image, _ in ours] == [image for image, _ in theirs]:
        differences = [b - a for (_, a), (_, b) in zip(ours, theirs, strict=True)]
        return sign * fmean(differences), stdev(differences) / math.sqrt(len(differences)), "image by image"
    gain = sign * (best.value - value.value)
    if value.standard_error is None or best.standard_error is None:
        return gain, None, ""
    return gain, math.hypot(value.standard_error, best.standard_error), "as independent numbers"
