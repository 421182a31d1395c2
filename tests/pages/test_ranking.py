"""Rankings: the newest number of every version, one protocol id, ties, directions, baselines and published rows."""

from dataclasses import replace

import pytest

from tarflow_scale.config.protocols import BitsPerDimProtocol, BoundProtocol, ManifoldProtocol
from tarflow_scale.config.report import LeaderboardConfig
from tarflow_scale.errors import ConfigError
from tarflow_scale.pages.markdown import markdown
from tarflow_scale.pages.ranking import Entry, rank
from tarflow_scale.records import DataSetFacts, MetricsReport, MetricValue, ModelVersion, PixelFormat
from tarflow_scale.registry import ModelState

BITS = BitsPerDimProtocol(name="bits", metric="bits_per_dim", bit_depth=8)
BOUND = BoundProtocol(name="bits_bound", metric="bits_per_dim_bound", bit_depth=8)
RECALL = ManifoldProtocol(
    name="recall", metric="recall", extractor="pixels", num_images=10, num_reference_images=10, bit_depth=8
)
PUBLISHED = ({"model": "Other <b>|x", "value": 1.5, "source": "a paper"},)


def board(**changes: object) -> LeaderboardConfig:
    facts = {"name": "it", "title": "It", "protocol": "unused.yaml"}
    return LeaderboardConfig.model_validate(facts | changes)


def entry(model: str, *values: float, identity: str = "a" * 64, protocol: object = BITS, **report: object) -> Entry:
    """A model whose versions have one number each; the first is champion."""
    facts = DataSetFacts(
        name="d", split="train", digest="0" * 64, image_size_pixels=8, num_channels=1, class_names=(), num_images=9
    )
    state = ModelState(aliases={"champion": 1})
    for number, value in enumerate(values, start=1):
        state.versions[number] = ModelVersion(
            version=number, files={}, pixels=PixelFormat(bit_depth=8, noise="uniform"), data=facts, parameters=7,
            images_seen=None, ema_half_life_images=None, config_digest="0", git_commit="", packages={},
        )  # fmt: skip
        metric = MetricValue(
            value=value, unit="u", standard_error=0.1, num_images=10, protocol="p",
            protocol_digest=protocol.digest, protocol_id=identity,  # type: ignore[attr-defined]
        )  # fmt: skip
        one = {"model": model, "version": number, "weights_digest": "", "metrics": {"p": metric}, "baselines": {},
               "sampling": {}, "seconds": 1.0, "packages": {}}  # fmt: skip
        state.reports[number] = [MetricsReport.model_validate(one | report)]
    return Entry("registry", model, state)


def test_lower_is_better_and_ties_share_a_rank() -> None:
    found = rank(board(published=PUBLISHED), BITS, [entry("a", 2.0, 1.0), entry("b", 2.0, 3.0)])
    assert [(row.model, row.rank) for row in found.rows] == [
        ("a@2", 1), ("Other <b>|x", None), ("a@1", 2), ("b@1", 2), ("b@2", 4),
    ]  # fmt: skip
    first = found.ours[0]
    assert (first.low, first.high) == (pytest.approx(0.804), pytest.approx(1.196))
    assert found.ours[1].aliases == ("champion",)


def test_higher_is_better_where_the_measure_says_so() -> None:
    found = rank(board(), RECALL, [entry("a", 0.2, 0.9, protocol=RECALL)])
    assert [(row.model, row.rank) for row in found.rows] == [("a@2", 1), ("a@1", 2)]


def test_several_protocol_ids_are_refused_unless_one_is_asked_for() -> None:
    entries = [entry("a", 2.0), entry("b", 1.0, identity="b" * 64)]
    with pytest.raises(ConfigError, match=r"would mix protocol ids \(got a@1 \(a{12}\) and b@1 \(b{12}\)\)"):
        rank(board(), BITS, entries)
    for whole_or_first_digits in ("a" * 64, "a" * 12):  # as reports show them
        assert [row.model for row in rank(board(protocol_id=whole_or_first_digits), BITS, entries).rows] == ["a@1"]


def test_a_board_of_bounds_calls_its_numbers_and_published_ones_bounds() -> None:
    entries = [entry("exact", 1.0), entry("a", 2.0, protocol=BOUND)]
    title = {"title": "It: upper bound"}
    with pytest.raises(ConfigError, match=r"leaderboard it must have the word bound in its title, .*\(got 'It'\)"):
        rank(board(), BOUND, entries)
    with pytest.raises(ConfigError, match=r"with the word bound in their note, .*\(got '' for Other"):
        rank(board(**title, published=PUBLISHED), BOUND, entries)
    published = [{**PUBLISHED[0], "note": "a bound, too"}]
    found = rank(board(**title, published=published), BOUND, entries)
    assert [row.model for row in found.rows] == ["Other <b>|x", "a@1"]
    assert [row.model for row in rank(board(), BITS, entries).rows] == ["exact@1"]


def test_models_of_one_name_in_two_registries_are_told_apart() -> None:
    entries = [entry("a", 2.0), replace(entry("a", 1.0), registry="other"), entry("b", 3.0)]
    assert [row.model for row in rank(board(), BITS, entries).rows] == ["a@1 of other", "a@1 of registry", "b@1"]


def test_numbers_by_other_protocols_are_no_rows() -> None:
    assert rank(board(), RECALL, [entry("a", 2.0)]).rows == ()


def test_the_newest_number_of_a_version_counts() -> None:
    one = entry("a", 2.0)
    (report,) = one.state.reports[1]
    newer = report.metrics["p"].model_copy(update={"value": 1.25})
    one.state.reports[1].append(report.model_copy(update={"metrics": {"p": newer}}))
    assert [row.value for row in rank(board(), BITS, [one]).rows] == [1.25]


def test_baselines_stand_among_the_rows_once() -> None:
    entries = [entry(name, 2.0, baselines={"gaussian_bits": 2.5, "real_other": 0.0}) for name in "ab"]
    found = rank(board(), BITS, entries)
    assert [(row.model, row.rank) for row in found.rows] == [("a@1", 1), ("b@1", 1), ("full-covariance Gaussian", None)]


def test_markdown_survives_what_names_may_hold() -> None:
    text = markdown("T", ["a<b is best."], [rank(board(published=PUBLISHED), BITS, [entry("a", 2.0)])])
    lines = text.splitlines()
    assert "| 1 | a@1 (champion) | 2.000 | 1.804 to 2.196 | 10 | 7 |  |" in lines
    assert lines[2] == "a&lt;b is best."
    assert "|  | Other &lt;b>\\|x | 1.5 |  |  |  | a paper |" in lines
    assert "Published numbers were measured by other protocols, so they have no rank." in lines


def test_all_numbers_of_a_board_have_one_format() -> None:
    """As many decimals as four digits of the best need; a published number gets no digit that was not printed."""
    published = ({"model": "o", "value": 30.5, "source": "s"}, {"model": "p", "value": 41.23456, "source": "s"})
    found = rank(board(published=published), BITS, [entry("a", 18.8412, 472.31234, baselines={"gaussian_bits": 53.0})])
    assert [found.shown(row) for row in found.rows] == ["18.84", "30.5", "41.23", "53.00", "472.31"]
    assert found.number(found.ours[0].low or 0) == "18.65"


def test_intervals_share_a_scale_of_round_numbers() -> None:
    found = rank(board(), BITS, [entry("a", 1.9, 2.3)])
    assert found.scale == pytest.approx([1.5, 2.0, 2.5])
    assert rank(board(), BITS, []).scale == []
