"""The gate: a pure decision with every reason."""

import dataclasses

import numpy as np
import pytest

from tarflow_scale.config.protocols import BitsPerDimProtocol, GateConfig, InceptionScoreProtocol, SampledProtocol
from tarflow_scale.config.sampling import SamplingConfig
from tarflow_scale.records import FileRecord, MetricsReport, MetricValue
from tarflow_scale.registry import Contender, decide

PROTOCOL = BitsPerDimProtocol(name="bits", metric="bits_per_dim", bit_depth=4)
EARLIER = BitsPerDimProtocol(name="bits", metric="bits_per_dim", bit_depth=4, seed=9)


def contender(
    name: str,
    *values: float,
    protocol: BitsPerDimProtocol | SampledProtocol = PROTOCOL,
    identity: str = "id",
    error: float | None = 0.01,
) -> Contender:
    reports = [
        MetricsReport(
            model="m",
            version=1,
            weights_digest="w",
            metrics={
                "bits": MetricValue(
                    value=value,
                    unit="bits/dim",
                    standard_error=error,
                    num_images=5,
                    protocol=protocol.name,
                    protocol_digest=protocol.digest,
                    protocol_id=identity,
                )
            },
            baselines={},
            sampling=SamplingConfig(),
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


def test_the_champion_must_be_beaten_by_the_margin_and_more_than_chance() -> None:
    beat = gate(must_beat_champion=True, margin=0.05)
    assert outcome(beat, contender("m@2", 1.9)) == (True, "there is no champion yet")
    assert outcome(beat, contender("m@2", 1.9), contender("m@2", 1.9)) == (True, "the version is already the champion")
    holds, found = outcome(beat, contender("m@2", 1.9), contender("m@1", 2.0))
    assert (holds, found) == (
        True,
        "1.9000 against 2.0000 of m@1: better by 0.1000 ± 0.0141, compared as independent numbers",
    )
    assert not outcome(beat, contender("m@2", 1.96), contender("m@1", 2.0))[0]
    # 0.1 - 0.05 is 2 standard errors of the difference, hypot(0.015, 0.02)
    noisy = contender("m@2", 1.9, error=0.015), contender("m@1", 2.0, error=0.02)
    assert outcome(beat, *noisy)[0]
    sure = decide(gate(must_beat_champion=True, margin=0.05, confidence=0.999), {"p.yaml": PROTOCOL}, *noisy)
    assert not sure.promoted
    assert sure.reasons[0].requirement == "bits below the champion's by more than 0.05, with 99.9% confidence"


def test_point_values_alone_never_decide() -> None:
    holds, found = outcome(
        gate(must_beat_champion=True), contender("m@2", 1.0, error=None), contender("m@1", 2.0, error=None)
    )
    assert not holds
    assert "without standard errors" in found


def per_image(one: Contender, sha256: str, images: list[bytes], numbers: np.ndarray) -> Contender:
    """The contender, with the numbers of which its own is the mean."""
    report = one.reports[0]
    kept = {"value": float(numbers.mean()), "per_image": FileRecord(sha256=sha256, bytes=1)}
    changed = report.model_copy(update={"metrics": {"bits": report.metrics["bits"].model_copy(update=kept)}})
    pairs = sorted(zip(images, numbers.tolist(), strict=True))
    return dataclasses.replace(one, reports=[changed], per_image={sha256: pairs})


def test_likelihoods_are_compared_image_by_image() -> None:
    """Images differ by far more than models do, which hides the difference of means but not the mean difference."""
    generator = np.random.default_rng(0)
    of_image = generator.normal(3, 1, 200)
    better = of_image - 0.02 + generator.normal(0, 0.05, 200)
    images = [bytes([i]) for i in range(200)]
    error = float(of_image.std() / 200**0.5)
    shuffled = generator.permutation(200)
    candidate = per_image(contender("m@2", 3, error=error), "a" * 64, [images[i] for i in shuffled], better[shuffled])
    champion = per_image(contender("m@1", 3, error=error), "b" * 64, images, of_image)
    holds, found = outcome(gate(must_beat_champion=True), candidate, champion)
    assert holds
    assert found.endswith("image by image")
    assert not outcome(gate(must_beat_champion=True), champion, dataclasses.replace(candidate, name="m@3"))[0]
    other = per_image(contender("m@1", 3, error=error), "b" * 64, [b"x", *images[1:]], of_image)
    holds, found = outcome(gate(must_beat_champion=True), candidate, other)
    assert not holds
    assert found.endswith("as independent numbers")


def test_where_more_is_better() -> None:
    score = InceptionScoreProtocol(
        name="is", metric="inception_score", extractor="inception-v3-compat", num_images=100, bit_depth=8
    )
    low, high = (contender(name, value, protocol=score) for name, value in (("m@1", 5.0), ("m@2", 6.0)))
    for candidate, champion, expected in ((high, low, True), (low, high, False)):
        decision = decide(gate(must_beat_champion=True, minimum=4.0), {"p.yaml": score}, candidate, champion)
        assert decision.promoted is expected
        assert decision.reasons[0].holds
    assert not decide(gate(minimum=5.5), {"p.yaml": score}, low, None).promoted


def test_images_and_approvals_that_are_asked_for() -> None:
    assert outcome(gate(minimum_images=5), contender("m@2", 1.0)) == (True, "5")
    assert outcome(gate(minimum_images=6), contender("m@2", 1.0)) == (False, "5")
    asked = gate(maximum=2.0).model_copy(update={"approvals": ("ada", "grace")})
    one = dataclasses.replace(contender("m@2", 1.0), approvals=("ada",))
    assert outcome(asked, one) == (False, "by ada")
    assert outcome(asked, dataclasses.replace(one, approvals=("ada", "grace"))) == (True, "by ada, grace")


def test_numbers_of_other_protocol_ids_are_never_compared() -> None:
    promoted, found = outcome(
        gate(must_beat_champion=True), contender("m@2", 1.0), contender("m@1", 2.0, identity="other reference")
    )
    assert not promoted
    assert "no number with the same protocol id" in found


def test_no_report_and_a_report_by_another_protocol() -> None:
    holds, found = outcome(gate(maximum=2.0), contender("m@2"))
    assert not holds
    assert found == "the version has no report; run 'tarflow-scale evaluate' first"
    holds, found = outcome(gate(maximum=2.0), contender("m@2", 1.0, protocol=EARLIER))
    assert not holds
    only = "the version has reports only by other protocols, or by an earlier edition of this protocol (bits); "
    assert found == f"{only}run 'tarflow-scale evaluate' with this protocol"


def test_a_number_with_the_same_id_is_found_behind_a_newer_one() -> None:
    champion = contender("m@1", 2.0)
    champion.reports.extend(contender("m@1", 0.5, identity="other reference").reports)
    holds, found = outcome(gate(must_beat_champion=True), contender("m@2", 1.0), champion)
    assert holds
    assert found.startswith("1.0000 against 2.0000 of m@1")


def test_a_gate_can_pin_the_images() -> None:
    assert outcome(gate(maximum=2.0, protocol_id="id"), contender("m@2", 1.0))[0]
    holds, found = outcome(gate(maximum=2.0, protocol_id="id"), contender("m@2", 1.0, identity="training images"))
    assert not holds
    assert found.startswith("the version has reports only by other protocols, or by an earlier edition")


def test_a_requirement_must_ask_for_something() -> None:
    with pytest.raises(ValueError, match="needs maximum, minimum, minimum_images or must_beat_champion"):
        gate()
