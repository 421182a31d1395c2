"""The first sentences of a report: the best model, its lead, the certainty of the lead, and the gate's decision."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from tarflow_scale.pages.numbers import decimals_of, fixed
from tarflow_scale.pages.ranking import Ranking, Row
from tarflow_scale.pages.runs import Run
from tarflow_scale.registry import Decision

__all__ = ["Lead", "Word", "answer", "answer_of_runs", "champion_of", "gate_said", "readable"]

_CERTAIN, _PROBABLE = 0.999, 0.95


@dataclass(frozen=True)
class Lead:
    """The lead of the best version over another version.

    Args:
        other: the row of the other version.
        gain: difference of the numbers; positive if the best version is better.
        error: standard error of the gain; None if unknown.
        how: description of how the error was computed, such as ``image by image``.
    """

    other: Row
    gain: float
    error: float | None
    how: str


@dataclass(frozen=True)
class Word:
    """The decision of a gate on the best version.

    Args:
        decision: the decision with its reasons.
        alias: the alias that moved to the version after this decision; None if the gate decided only for this report.
        override: reason for moving the alias although the gate refused; empty if the gate did not refuse.
    """

    decision: Decision
    alias: str | None = None
    override: str = ""


def champion_of(ranking: Ranking) -> Row | None:
    """The best row with the alias ``champion`` or another alias that a gate guards; None if there is no such row."""
    for row in ranking.ours:
        if row.entry is not None and {*row.aliases} & {"champion", *row.entry.state.guarded}:
            return row
    return None


def answer(ranking: Ranking, lead: Lead | None) -> str:
    """The conclusion of a leaderboard as a sentence without a full stop.

    Args:
        ranking: the rows of the leaderboard.
        lead: comparison of the best version with the champion, or with the next best if the best is the champion; None
            if there is no other version.
    """
    title = ranking.board.title
    if not ranking.ours:
        return f"{title}: no registered version has a number by protocol {ranking.protocol.name} yet"
    best, *worse = ranking.ours
    equal = [row.model for row in worse if row.rank == best.rank]
    better = "higher" if ranking.protocol.higher_is_better else "lower"
    interval = ""
    if best.low is not None and best.high is not None:
        interval = f"95 % interval {ranking.number(best.low)} to {ranking.number(best.high)}; "
    parts = [
        f"{title}: {' and '.join([best.model, *equal])} {'are' if equal else 'is'} best with "
        f"{ranking.number(best.value)} {ranking.unit} ({interval}{better} is better)"
    ]
    parts += [f"{_gained(ranking, row.value)} {row.model} ({ranking.number(row.value)})" for row in ranking.to_beat]
    parts += [_against(ranking, lead)] if lead is not None else [] if worse else ["no other version was measured"]
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last


def _gained(ranking: Ranking, other: float) -> str:
    gain = (ranking.ours[0].value - other) * (1 if ranking.protocol.higher_is_better else -1)
    return f"{ranking.number(abs(gain))} {'better' if gain >= 0 else 'worse'} than the"


def _against(ranking: Ranking, lead: Lead) -> str:
    champion = champion_of(ranking)
    role = "the champion" if champion is lead.other else "the next best"
    if lead.gain == 0:
        return f"exactly as good as {role}, {lead.other.model}"
    if not lead.error:
        return f"{ranking.number(lead.gain)} better than {role}, {lead.other.model}, with unknown certainty"
    certainty = NormalDist().cdf(lead.gain / lead.error)
    if certainty >= _CERTAIN:
        words = "more than 99.9 % certain"
    else:
        words = f"{'only ' if certainty < _PROBABLE else ''}{100 * certainty:.1f} % certain"
    return (
        f"{ranking.number(lead.gain)} ± {ranking.number(lead.error)} better than {role}, {lead.other.model} "
        f"({lead.how}: {words})"
    )


def gate_said(model: str, word: Word | None) -> str:
    """Why a gate accepted or refused a version, as a sentence without a full stop.

    Args:
        model: ``model@version``.
        word: the decision; None if no gate has decided.
    """
    if word is None:
        return f"no gate has decided on {model}"
    decision = word.decision
    gate = f"gate {decision.gate}" if decision.gate else "a gate"
    failed = ", ".join(f"{reason.requirement} (got {reason.found})" for reason in decision.reasons if not reason.holds)
    if decision.promoted:
        # Numbers are in the tables of the page, so only findings in words are repeated here.
        held = ", ".join(
            reason.requirement if reason.found[:1].isdigit() else f"{reason.requirement} ({reason.found})"
            for reason in decision.reasons
        )
        said = f"{gate} {f'made it {word.alias}' if word.alias else 'would accept it'}{held and ': '}{held}"
    else:
        overridden = f"; it became {word.alias} anyway: {word.override}" if word.alias else ""
        said = f"{gate} refuses it: {failed}{overridden}"
    return readable(said)


def readable(text: str) -> str:
    """Reformat text of a gate: ``1.2346`` becomes ``1.235``, ``95%`` becomes ``95 %``, ``<=`` becomes ``≤``."""
    shorter = re.sub(r"\d+\.\d{4}\b", lambda match: fixed(float(match[0]), decimals_of(float(match[0]))), text)
    return re.sub(r"(?<=\d)%", " %", shorter).replace("<=", "≤").replace(">=", "≥")


def answer_of_runs(runs: Sequence[Run]) -> list[str]:
    """One sentence about the lowest loss in each group of comparable runs.

    It names the lowest held-out loss, or the lowest training loss if the group has no held-out loss.
    """
    sentences: list[str] = []
    groups = list(dict.fromkeys((run.loss.unit, run.measured_on) for run in runs))
    for unit, measured_on in groups:
        of_group = [run for run in runs if (run.loss.unit, run.measured_on) == (unit, measured_on)]
        for kind, place in (("held-out", 1), ("training", 0)):
            lasts = [(run.loss.series[place][-1], run) for run in of_group if run.loss.series[place]]
            lasts = [last for last in lasts if math.isfinite(last[0][1])]  # NaN is neither lower nor higher
            if lasts:
                (images, value), run = min(lasts, key=lambda item: item[0][1])
                total = f" of {run.total_images:,}" if run.total_images else ""
                among = f", of {len(lasts)} runs" if len(lasts) > 1 else ""
                among += f" on {measured_on}" if len(groups) > 1 and measured_on else ""
                sentences.append(
                    f"{run.name} has the lowest {kind} loss{among}: {fixed(value, decimals_of(value))} {unit} after "
                    f"{images:,.0f}{total} images{f'; it is {run.state}' if run.state else ''}."
                )
                break
    return sentences
