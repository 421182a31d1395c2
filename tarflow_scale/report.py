"""Verb ``report``: leaderboards of what registries hold, as Markdown and as a page that people look at.

Read leaderboards and their protocols, fold the logs of all models, rank the numbers that share a protocol id, gather
the pictures and curves that go with them, and write ``leaderboard.md`` and one self-contained ``index.html``.

Reads ``report.leaderboards``, ``report.registries`` and the logs of ``report.runs``; writes into ``report.path``.
Numbers of several protocol ids on one board are an error, not a footnote. Nothing is kept between runs: it is all made
anew.
"""

import json
import warnings
from pathlib import Path
from typing import Any

from tarflow_scale import storage
from tarflow_scale.config import LeaderboardConfig, ReportConfig, load_config, load_protocol
from tarflow_scale.errors import DataError
from tarflow_scale.pages.charts import Points
from tarflow_scale.pages.html import Page, html_page
from tarflow_scale.pages.markdown import markdown
from tarflow_scale.pages.ranking import Entry, Ranking, rank
from tarflow_scale.registry import Registry, readable_models

__all__ = ["run"]


def run(config: ReportConfig, dry_run: bool) -> None:
    """Rank, print, and write both files.

    Raises:
        UserError: no such registry or run; rows of one leaderboard carry several protocol ids.
    """
    report = config.report
    entries = [
        Entry(registry, model, state)
        for registry in report.registries
        for model, state in readable_models(registry).items()
    ]
    rankings: list[Ranking] = []
    for path in report.leaderboards:
        board = load_config(LeaderboardConfig, path, [])
        rankings.append(rank(board, load_protocol(board.protocol), entries))
        if not rankings[-1].ours:
            _say_why_empty(board, entries)
    text = markdown(report.title, rankings)
    print(text)
    if dry_run:
        return
    curves = {name: points for run in report.runs for name, points in _curves(run).items()}
    page = Page(report.title, rankings, entries, _pictures(rankings), curves)
    storage.write_bytes(storage.join(report.path, "leaderboard.md"), text.encode())
    storage.write_bytes(storage.join(report.path, "index.html"), html_page(page).encode())
    print(f"look at {report.path}/index.html")


def _say_why_empty(board: LeaderboardConfig, entries: list[Entry]) -> None:
    """A leaderboard without rows of ours is allowed, as there may be none yet, but not passed over in silence."""
    models = ", ".join(sorted({entry.model for entry in entries})) or "no model"
    wanted = board.protocol + (f" with protocol_id {board.protocol_id}" if board.protocol_id else "")
    warnings.warn(
        f"leaderboard {board.name} has no row of ours: no version of {models} was evaluated by {wanted}; evaluate one, "
        f"or look at report.registries and report.leaderboards",
        stacklevel=2,
    )


def _pictures(rankings: list[Ranking]) -> dict[str, bytes]:
    """The grids of all rows, by digest; verified as they are read."""
    found: dict[str, bytes] = {}
    for ranking in rankings:
        for row in ranking.ours:
            if row.grid is not None and row.entry is not None and row.grid.sha256 not in found:
                registry = Registry(row.entry.registry, row.entry.model)
                found[row.grid.sha256] = registry.read(f"grid of {row.model}", row.grid)
    return found


def _curves(run: str) -> dict[str, Points]:
    """Bits/dim over images seen, of training and of validation where that was logged.

    Raises:
        DataError: the log holds something else.
    """
    location, name = storage.join(run, "log.jsonl"), Path(run).name
    lines = storage.read_bytes(location).decode().splitlines()
    try:
        records: list[dict[str, Any]] = [json.loads(line) for line in lines]
        series = {
            label: [(float(one["images"]), float(one[key])) for one in records if one.get(key) is not None]
            for label, key in ((name, "bits_per_dim"), (f"{name}, validation", "validation_bits_per_dim"))
        }
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{location} is not the log of a training run ({error}); remove it from report.runs") from error
    if not any(series.values()):
        print(f"{run} has no curve: a run on noisy images or on vectors has no bits/dim")
    return {label: points for label, points in series.items() if points}
