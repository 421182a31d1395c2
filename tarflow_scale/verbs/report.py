"""Verb ``report``: show registries, training runs and generated data sets as Markdown and as an HTML page.

Read leaderboards and their protocols, read the logs of all models, rank the numbers that share a protocol id, compare
the best version with the champion, collect samples and loss curves, and write ``leaderboard.md`` and one self-contained
``index.html``. Both begin with one sentence per leaderboard.

Reads ``report.leaderboards``, ``report.registries``, ``report.gate``, and the folders ``report.runs`` and
``report.generated``, all of them optional; writes into ``report.path``. Numbers with different protocol ids on one
leaderboard are an error. Each report is written from the beginning; there is nothing to resume.
"""

import warnings
from collections.abc import Sequence
from typing import Any

from tarflow_scale import storage
from tarflow_scale.config.base import load_named
from tarflow_scale.config.protocols import load_gate, load_protocol
from tarflow_scale.config.report import LeaderboardConfig, ReportConfig
from tarflow_scale.errors import DataError
from tarflow_scale.pages.answers import Lead, Word, answer, answer_of_runs, champion_of, gate_said
from tarflow_scale.pages.html import Page, Picture, html_page
from tarflow_scale.pages.markdown import markdown
from tarflow_scale.pages.ranking import Entry, Ranking, Row, rank
from tarflow_scale.pages.runs import Run, read_run
from tarflow_scale.records import GenerationPlan
from tarflow_scale.registry import Contender, Decision, Registry, decide, lead, read_contender, readable_models

__all__ = ["run"]


def run(config: ReportConfig, dry_run: bool) -> None:
    """Rank the versions, print the leaderboards, and write both files.

    Raises:
        UserError: a registry or run does not exist, or rows of one leaderboard have different protocol ids.
    """
    report = config.report
    entries = [entry for registry in _each_once(report.registries) for entry in _entries(registry)]
    rankings = [_ranking(path, entries) for path in report.leaderboards]
    words = {ranking.board.name: word for ranking in rankings if (word := _word(ranking, report.gate)) is not None}
    runs = [_run(path) for path in _each_once(report.runs)]
    pictures = [picture for path in _each_once(report.generated) if (picture := _generated(path)) is not None]
    answers = [*_answers(rankings, words), *answer_of_runs(runs)]
    text = markdown(report.title, answers, rankings)
    if dry_run:
        print(text)
        return
    page = Page(report.title, answers, rankings, words, entries, _grids(rankings), runs, pictures)
    storage.write_bytes(storage.join(report.path, "leaderboard.md"), text.encode())
    storage.write_bytes(storage.join(report.path, "index.html"), html_page(page).encode())
    print(f"{text}\nopen {report.path}/index.html in a browser")


def _each_once(paths: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(path.rstrip("/") or "/" for path in paths))


def _answers(rankings: list[Ranking], words: dict[str, Word]) -> list[str]:
    """One sentence per leaderboard. The first sentence about a version also contains the gate's decision on it."""
    sentences: list[str] = []
    mentioned: set[str] = set()
    for ranking in rankings:
        sentence = answer(ranking, _lead(ranking))
        for row in ranking.ours[:1]:
            if row.model not in mentioned:
                mentioned.add(row.model)
                sentence += f"; {gate_said(row.model, words.get(ranking.board.name))}"
        sentences.append(f"{sentence}.")
    return sentences


def _entries(registry: str) -> list[Entry]:
    models = readable_models(registry)
    print(f"reading registry {registry}: {', '.join(models)}")
    return [Entry(registry, model, state) for model, state in models.items()]


def _ranking(path: str, entries: list[Entry]) -> Ranking:
    board = load_named(LeaderboardConfig, path, "leaderboard", "report.leaderboards")
    ranking = rank(board, load_protocol(board.protocol, f"protocol of leaderboard {board.name}"), entries)
    if not ranking.ours:  # only a warning, because perhaps nothing is evaluated yet
        models = ", ".join(sorted({entry.model for entry in entries})) or "no model"
        wanted = board.protocol + (f" with protocol_id {board.protocol_id}" if board.protocol_id else "")
        warnings.warn(
            f"leaderboard {board.name} has no row from report.registries: no version of {models} was evaluated by "
            f"{wanted}; evaluate a version, or check report.registries and report.leaderboards",
            stacklevel=2,
        )
    return ranking


def _contender(row: Row) -> Contender:
    assert row.entry is not None
    assert row.version is not None
    return read_contender(Registry(row.entry.registry, row.entry.model), row.entry.state, row.version.version)


def _lead(ranking: Ranking) -> Lead | None:
    """Compare the best version with the champion. If the best is the champion, or none exists, use the second best."""
    best, *worse = ranking.ours or [None]
    champion = champion_of(ranking)
    other = champion if champion is not None and champion is not best else next(iter(worse), None)
    if best is None or other is None or best.metric is None or other.metric is None:
        return None
    return Lead(other, *lead(ranking.protocol, _contender(best), best.metric, _contender(other), other.metric))


def _word(ranking: Ranking, gate_path: str | None) -> Word | None:
    """The gate's decision on the best version: from the log, else by ``report.gate``; None if neither is available."""
    best = next(iter(ranking.ours), None)
    if best is None or best.entry is None or best.version is None:
        return None
    registry, state = Registry(best.entry.registry, best.entry.model), best.entry.state
    for event in reversed(state.history):
        if event.kind == "promote" and event.version == best.version.version:
            payload = registry.log.read(event.number).payload
            recorded: dict[str, Any] = {"gate": "", "promoted": True, "reasons": (), **payload["decision"]}
            override = str(recorded.pop("override", ""))
            if payload["alias"] in best.aliases:  # otherwise the alias has moved to another version since
                return Word(Decision.model_validate(recorded), payload["alias"], override)
    if gate_path is None:
        return None
    gate, protocols = load_gate(gate_path, "report.gate")
    alias = next((name for name, guard in state.guarded.items() if guard == gate.name), None)
    holder = state.aliases.get(alias) if alias else None
    champion = read_contender(registry, state, holder) if holder is not None else None
    return Word(decide(gate, protocols, _contender(best), champion))


def _grids(rankings: list[Ranking]) -> dict[str, bytes]:
    """Read the sample grids of all rows and verify their digests; returns them by SHA-256."""
    grids: dict[str, bytes] = {}
    for ranking in rankings:
        for row in ranking.ours:
            if row.grid is not None and row.entry is not None and row.grid.sha256 not in grids:
                registry = Registry(row.entry.registry, row.entry.model)
                grids[row.grid.sha256] = registry.read(f"grid of {row.model}", row.grid)
    return grids


def _run(path: str) -> Run:
    print(f"reading run {path}")
    result = read_run(path)
    if not any(result.loss.series):
        print(f"{path} has no curve yet: its log contains no loss")
    return result


def _generated(path: str) -> Picture | None:
    """The picture of the first samples that ``generate`` wrote. If there is none yet, warn and return None.

    Raises:
        DataError: the plan is damaged.
    """
    print(f"reading generated images {path}")
    location = storage.join(path, "plan.json")
    content, grid = storage.read_if_there(location), storage.read_if_there(storage.join(path, "grid.png"))
    if content is None or grid is None:
        missing = "plan.json" if content is None else "grid.png"
        warnings.warn(
            f"{path} has no samples to show (no {missing}); generate them, or correct report.generated", stacklevel=2
        )
        return None
    plan = GenerationPlan.from_json(content, location, DataError)
    caption = f"{path}: the first of {plan.num_images:,} images of {plan.model}@{plan.version}, seed {plan.seed}"
    return Picture(grid, caption, plan.sampling.model_dump())
