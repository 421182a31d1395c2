"""The sentence that comes first: who is best, by how much, how certainly, and what a gate said."""

import math

import pytest

from tarflow_scale.pages.answers import Lead, Word, answer, answer_of_runs, champion_of, gate_said
from tarflow_scale.pages.ranking import Entry, Ranking, rank
from tarflow_scale.pages.runs import Loss, Run
from tarflow_scale.registry.gate import Decision, Reason
from tests.pages.test_ranking import BITS, RECALL, board, entry


def guarded(one: Entry) -> Entry:
    one.state.guarded["champion"] = "digits"
    return one


def ranking(*values: float) -> Ranking:
    return rank(board(), BITS, [guarded(entry("a", *values, baselines={"gaussian_bits": 2.5, "real_bits": 0.1}))])


def test_best_is_compared_with_baseline_and_champion() -> None:
    found = ranking(2.0, 1.25)
    champion = champion_of(found)
    assert champion is not None
    assert champion.model == "a@1"
    said = answer(found, Lead(champion, 0.75, 0.05, "image by image"))
    assert said == (
        "It: a@2 is best with 1.250 u (95 % interval 1.054 to 1.446; lower is better), 1.250 better than the "
        "full-covariance Gaussian (2.500) and 0.750 ± 0.050 better than the champion, a@1 (image by image: more than "
        "99.9 % certain)"
    )


@pytest.mark.parametrize(
    ("error", "words"),
    [(0.05, "97.7 % certain"), (0.1, "only 84.1 % certain"), (None, "with unknown certainty")],
)
def test_how_certain_it_is(error: float | None, words: str) -> None:
    found = ranking(1.25, 2.0)  # the champion is the best itself
    said = answer(found, Lead(found.ours[1], 0.1, error, "as independent numbers"))
    assert "better than the next best, a@2" in said
    assert words in said


def test_equal_numbers_are_said_to_be_equal() -> None:
    found = ranking(1.25, 1.25)
    assert answer(found, Lead(found.ours[1], 0.0, 0.0, "image by image")).endswith(
        " and exactly as good as the next best, a@2"
    )


def test_a_model_that_is_worse_than_the_baseline_and_alone() -> None:
    assert answer(ranking(3.0), None) == (
        "It: a@1 is best with 3.000 u (95 % interval 2.804 to 3.196; lower is better), 0.500 worse than the "
        "full-covariance Gaussian (2.500) and no other version was measured"
    )


def test_ties_and_measures_that_grow() -> None:
    found = rank(board(), RECALL, [entry("a", 0.5, 0.5, protocol=RECALL)])
    assert answer(found, None).startswith(
        "It: a@1 and a@2 are best with 0.5000 u (95 % interval 0.3040 to 0.6960; higher"
    )


def test_no_numbers_yet() -> None:
    assert answer(rank(board(), BITS, []), None) == "It: no registered version has a number by protocol bits yet"


def test_what_a_gate_said() -> None:
    reasons = (
        Reason(requirement="bits <= 2.28 bits/dim", found="1.8970", holds=True),
        Reason(requirement="fid <= 26.5", found="281.8693", holds=False),
    )
    passed = Decision(gate="digits", promoted=True, reasons=reasons[:1])
    failed = Decision(gate="digits", promoted=False, reasons=reasons)
    assert gate_said("a@1", None) == "no gate has decided on a@1"
    assert gate_said("a@1", Word(passed, "champion")) == "gate digits made it champion: bits ≤ 2.28 bits/dim"
    assert gate_said("a@1", Word(passed)) == "gate digits would accept it: bits ≤ 2.28 bits/dim"
    no = "gate digits refuses it: fid ≤ 26.5 (got 281.9)"
    assert gate_said("a@1", Word(failed)) == no
    assert gate_said("a@1", Word(failed, "champion", "because")) == f"{no}; it became champion anyway: because"


def test_a_gate_that_had_nothing_to_compare_with_says_so() -> None:
    wanted = "bits below the champion's, with 95% confidence"
    first = Reason(requirement=wanted, found="there is no champion yet", holds=True)
    said = gate_said("a@1", Word(Decision(gate="digits", promoted=True, reasons=(first,)), "champion"))
    assert said.endswith(": bits below the champion's, with 95 % confidence (there is no champion yet)")


def run(path: str, loss: float, measured_on: str) -> Run:
    losses = Loss()
    losses.take({"images": 100, "bits_per_dim": loss})
    return Run(path, "glow", "", 100, 0, losses, measured_on)


def test_runs_on_other_data_are_not_compared() -> None:
    same = [run("a", 3.0, "digits"), run("b", 2.0, "digits")]
    assert answer_of_runs(same) == [
        "b (glow) has the lowest training loss, of 2 runs: 2.000 bits/dim after 100 images."
    ]
    assert answer_of_runs([*same, run("c", 1.0, "mnist")]) == [
        "b (glow) has the lowest training loss, of 2 runs on digits: 2.000 bits/dim after 100 images.",
        "c (glow) has the lowest training loss on mnist: 1.000 bits/dim after 100 images.",
    ]


def test_a_loss_that_is_not_finite_is_never_the_lowest() -> None:
    runs = [run("a", math.nan, "digits"), run("b", 2.0, "digits")]
    assert answer_of_runs(runs) == ["b (glow) has the lowest training loss: 2.000 bits/dim after 100 images."]
    assert answer_of_runs(runs[:1]) == []
