"""Answers, rankings, pictures, curves and history as one HTML file that makes no requests.

Styles, script and pictures are inside the file. The page begins with the answers. Keyboard users can sort tables and
fold details. The page follows the light or dark setting of the browser, and shows every number on a phone without
scrolling sideways. Only sorting needs the script. The markup is in ``page.html.jinja``, which escapes every value; the
security policy of the page allows only its own script.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from tarflow_scale.pages.answers import Word, readable
from tarflow_scale.pages.charts import line_chart
from tarflow_scale.pages.numbers import decimals_of, fixed, tick_labels
from tarflow_scale.pages.ranking import Entry, Ranking, Row
from tarflow_scale.pages.runs import Run, curves_of

__all__ = ["Page", "Picture", "html_page"]

_EVENTS = 200


@dataclass(frozen=True)
class Picture:
    """A picture on the page.

    Args:
        content: the PNG.
        caption: one line of text.
        details: names and values that are shown on demand.
    """

    content: bytes
    caption: str
    details: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Page:
    """Content of the page, from top to bottom.

    Args:
        title: heading of the page.
        answers: sentences below the heading.
        rankings: the leaderboards.
        words: the gate's decision on the best version of each leaderboard, by leaderboard name.
        entries: models whose history is shown.
        grids: PNGs with the first samples of versions, by the SHA-256 that the metrics report gives for each PNG.
        runs: training runs.
        generated: first samples of generated data sets.
    """

    title: str
    answers: Sequence[str]
    rankings: Sequence[Ranking] = ()
    words: Mapping[str, Word] = field(default_factory=dict)
    entries: Sequence[Entry] = ()
    grids: Mapping[str, bytes] = field(default_factory=dict)
    runs: Sequence[Run] = ()
    generated: Sequence[Picture] = ()


def html_page(page: Page) -> str:
    """The HTML file as text."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    units = dict.fromkeys(run.loss.unit for run in page.runs)
    charts = [(unit, line_chart(curves_of(page.runs, unit), "images seen", unit)) for unit in units]
    sections = [(ranking.board.name, ranking.board.title) for ranking in page.rankings]
    sections += [("training", "Training")] if page.runs else []
    sections += [("generated", "Generated images")] if page.generated else []
    sections += [("history", "Registry history")] if page.entries else []
    events = _events(page.entries)
    script = _asset("sort.js")
    template = environment.from_string(_asset("page.html.jinja"))
    return template.render(
        base64=_base64,
        place=_place,
        plain=_plain,
        tick_labels=tick_labels,
        page=page,
        sections=sections,
        boards=_boards(page),
        charts=[(unit, Markup(chart)) for unit, chart in charts if chart],  # noqa: S704 (texts of charts are escaped)
        runs=[_run(run) for run in page.runs],
        previews=[
            Picture(run.preview[1], f"{run.name}, after {int(run.preview[0][7:-4]):,} images")
            for run in page.runs
            if run.preview
        ],
        history=events[:_EVENTS],
        num_events=len(events),
        style=Markup(_asset("style.css")),  # noqa: S704
        script=Markup(script),  # noqa: S704
        script_digest=_base64(hashlib.sha256(script.encode()).digest()),
    )


def _boards(page: Page) -> list[dict[str, Any]]:
    """Template values of each ranking: protocol, gate decision and pictures. No picture is on the page twice."""
    grids = dict(page.grids)
    boards: list[dict[str, Any]] = []
    for ranking in page.rankings:
        pictures: list[Picture] = []
        for row in ranking.ours:
            if row.grid is not None and row.report is not None and row.grid.sha256 in grids:
                caption = f"{row.model}: {ranking.number(row.value)} {ranking.unit}"
                settings = row.report.sampling.model_dump() | _decoding(row)
                pictures.append(Picture(grids.pop(row.grid.sha256), caption, settings))
        word = page.words.get(ranking.board.name)
        reasons = [
            {"holds": "yes" if reason.holds else "no"}
            | {"requirement": readable(reason.requirement), "found": readable(reason.found)}
            for reason in (word.decision.reasons if word else ())
        ]
        protocol = {
            "protocol id": ranking.protocol_id or "unknown, because no version was evaluated",
            "unit": ranking.unit,
        }
        protocol |= ranking.protocol.model_dump(mode="json")
        gate = word.decision.gate if word else ""
        board = {"ranking": ranking, "protocol": protocol, "gate": gate, "reasons": reasons, "pictures": pictures}
        boards.append(board)
    return boards


def _run(run: Run) -> dict[str, str]:
    last = [points[-1][1] if points else None for points in run.loss.series]
    loss, held_out = ("" if value is None else f"{fixed(value, decimals_of(value))} {run.loss.unit}" for value in last)
    seen = f"{run.images_seen:,}" + (f" of {run.total_images:,}" if run.total_images else "")
    cells = {"run": run.path, "model": run.kind, "state": run.state}
    return cells | {"images seen": seen, "loss": loss, "held out": held_out}


def _decoding(row: Row) -> dict[str, str]:
    """Decoding iterations of each block; empty if the version was not calibrated."""
    if row.entry is None or row.version is None:
        return {}
    plans = row.entry.state.calibrations.get(row.version.version, [])
    if not plans:
        return {}
    plan = plans[-1]
    return {
        f"block {number} on {plan.device}": f"{mean:.1f} iterations for {block.chunk} tokens"
        if block.chunk > 1
        else "token by token"
        for number, (block, mean) in enumerate(zip(plan.blocks, plan.iterations, strict=True), start=1)
    }


def _events(entries: Sequence[Entry]) -> list[dict[str, str]]:
    """The events of the registries, newest first."""
    events = sorted(
        ((event.time, entry.model, event) for entry in entries for event in entry.state.history),
        key=lambda item: item[:2],
        reverse=True,
    )
    return [
        {"time, UTC": time[:19].replace("T", " "), "model": model}
        | {"event": event.kind, "who": event.actor, "why": event.reason}
        for time, model, event in events
    ]


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items())
    return "none" if value is None else str(value)


def _place(value: float, ticks: Sequence[float]) -> float:
    """The position of a value on an axis, in percent."""
    return 100 * (value - ticks[0]) / (ticks[-1] - ticks[0])


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _asset(name: str) -> str:
    return resources.files("tarflow_scale.pages").joinpath(name).read_text(encoding="utf-8")
