"""The gate: a pure decision with every reason."""

import pytest

from tarflow_scale.config import BitsPerDimProtocol, GateConfig
from tarflow_scale.errors import RegistryError
from tarflow_scale.records import MetricsReport, MetricValue
from tarflow_scale.registry import Contender, decide

PROTOCOL = BitsPerDimProtocol(name="bits", metric="bits_per_dim", bit_depth=4)
EARLIER = BitsPerDimProtocol(name="bits", metric="bits_per_dim", bit_depth=4, seed=9)


def contender(name: str, *values: float, protocol: BitsPerDimProtocol = PROTOCOL, identity: str = "id") -> Contender:
    reports = [
        MetricsReport(
            model="m",
            version=1,
            weights_digest="w",
            metrics={
                "bits": MetricValue(
                    value=value,
                    unit="bits/dim",
                    num_images=5,
                    protocol=protocol.name,
                    protocol_digest=protocol.digest,
                    protocol_id=identity,
                )
            },
            baselines={},
            sampling={},
            seconds=0,
            packages={},
        )
        for value in values
    ]
    return Contender(name, reports)


def gate(**requirement: object) -> GateConfig:
    return GateConfig.model_validate({"name": "g", "requirements": [{"protocol": "p.yaml", **requirement}]})


def outcome(gate_config: GateConfig, candidate: Contender, champion: Contender | None = None) -> tuple[bool, str]:
    decision = decide(gate_config, {"p.yaml": PROTOCOL}, candidate, champion)
    return decision.promoted, decision.reasons[-1].found


def test_a_bound() -> None:
    assert outcome(gate(maximum=2.0), contender("m@2", 1.9)) == (True, "1.9000")
    assert outcome(gate(maximum=2.0), contender("m@2", 2.1)) == (False, "2.1000")


def test_the_newest_report_counts() -> None:
    assert outcome(gate(maximum=2.0), contender("m@2", 1.9, 2.1)) == (False, "2.1000")


def test_the_champion_must_be_beaten_by_the_margin() -> None:
    beat = gate(must_beat_champion=True, margin=0.05)
    assert outcome(beat, contender("m@2", 1.9)) == (True, "there is no champion yet")
    assert outcome(beat, contender("m@2", 1.9), contender("m@2", 1.9)) == (True, "it is the champion")
    assert outcome(beat, contender("m@2", 1.9), contender("m@1", 2.0))[0]
    assert not outcome(beat, contender("m@2", 1.96), contender("m@1", 2.0))[0]


def test_numbers_of_other_protocol_ids_are_never_compared() -> None:
    promoted, found = outcome(
        gate(must_beat_champion=True), contender("m@2", 1.0), contender("m@1", 2.0, identity="other reference")
    )
    assert not promoted
    assert "no number with the same protocol id" in found


def test_no_report_and_a_report_by_another_protocol() -> None:
    with pytest.raises(
        RegistryError, match=r"m@2 has no report \(the gate asks for bits\); run 'tarflow-scale evaluate'"
    ):
        outcome(gate(maximum=2.0), contender("m@2"))
    with pytest.raises(RegistryError, match="m@2 has no number by this protocol bits"):
        outcome(gate(maximum=2.0), contender("m@2", 1.0, protocol=EARLIER))


def test_a_number_with_the_same_id_is_found_behind_a_newer_one() -> None:
    champion = contender("m@1", 2.0)
    champion.reports.extend(contender("m@1", 0.5, identity="other reference").reports)
    assert outcome(gate(must_beat_champion=True), contender("m@2", 1.0), champion) == (
        True,
        "1.0000 against 2.0000 of m@1",
    )


def test_a_gate_can_pin_the_images() -> None:
    assert outcome(gate(maximum=2.0, protocol_id="id"), contender("m@2", 1.0))[0]
    with pytest.raises(RegistryError, match="m@2 has no number by this protocol"):
        outcome(gate(maximum=2.0, protocol_id="id"), contender("m@2", 1.0, identity="training images"))


def test_a_requirement_must_ask_for_something() -> None:
    with pytest.raises(ValueError, match="needs maximum or must_beat_champion"):
        gate()
