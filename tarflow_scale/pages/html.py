"""Answers, rankings, pictures, curves and history as one HTML file that asks nothing of a network.

Styles, script and pictures are in the file. It answers first, sorts and folds by keyboard, follows the reader's light
or dark setting, and shows every number on a phone without scrolling aside, and without a script too.
"""

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib import resources

from tarflow_scale.pages.answers import Word, readable
from tarflow_scale.pages.charts import line_chart
from tarflow_scale.pages.numbers import decimals_of, fixed, tick_labels
from tarflow_scale.pages.ranking import Entry, Ranking, Row
from tarflow_scale.pages.runs import Run, curves_of

__all__ = ["Page", "Picture", "html_page"]

_COLUMNS = ("rank", "model", "value", "95 % interval", "images", "parameters", "images seen", "source")
_NUMBERS = frozenset(("rank", "value", "images", "parameters", "images seen"))
_EVENTS = 200


@dataclass(frozen=True)
class Picture:
    """A PNG with what it shows.

    Args:
        content: the PNG.
        caption: a line about it.
        facts: more, shown on demand.
    """

    content: bytes
    caption: str
    facts: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Page:
    """What is shown, from top to bottom.

    Args:
        words: what a gate said of the best of a leaderboard, by its name.
        entries: models whose history is shown.
        grids: PNGs of first samples by sha256, as reports name them.
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
    """The whole file."""
    grids = dict(page.grids)
    sections = [
        (ranking.board.name, ranking.board.title, _board(ranking, page.words.get(ranking.board.name), grids))
        for ranking in page.rankings
    ]
    sections += [("training", "Training", _training(page.runs))] if page.runs else []
    sections += [("generated", "Generated images", _figures(page.generated))] if page.generated else []
    sections += [("history", "Registry history", _history(page.entries))] if page.entries else []
    navigation = "".join(f'<li><a href="#{_text(name)}">{_text(title)}</a></li>' for name, title, _ in sections)
    body = "".join(
        f'<section id="{_text(n)}"><h2>{_text(title)}</h2>{inside}</section>' for n, title, inside in sections
    )
    answers = "".join(f"<p>{_text(sentence)}</p>" for sentence in page.answers)
    script = _asset("sort.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()  # no other script runs on the page
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        f"style-src 'unsafe-inline'; script-src 'sha256-{digest}'\">"
        f'<link rel="icon" href="data:,"><title>{_text(page.title)}</title><style>{_asset("style.css")}</style></head>'
        f'<body><header><h1>{_text(page.title)}</h1><div class="answer">{answers}</div>'
        f'<nav aria-label="Sections"><ul>{navigation}</ul></nav></header>'
        f"<main>{body}</main><script>{script}</script></body></html>\n"
    )


def _board(ranking: Ranking, word: Word | None, grids: dict[str, bytes]) -> str:
    """A section; pictures that it shows are taken out, so that each is on the page once."""
    parts: list[str] = []
    if not ranking.ours:
        parts.append('<p class="note">No registered version has a number by this protocol yet.</p>')
    if ranking.has_published:
        parts.append(
            '<p class="note">Published rows were measured on protocols of their own: other sample counts, references, '
            "rounding or noise. They stand in their place and carry no rank.</p>"
        )
    parts += [_table(ranking), _gate(word), _protocol(ranking)]
    pictures: list[Picture] = []
    for row in ranking.ours:
        if row.grid is not None and row.report is not None and row.grid.sha256 in grids:
            caption = f"{row.model}: {ranking.number(row.value)} {ranking.unit}"
            settings = row.report.sampling.model_dump() | _decoding(row)
            pictures.append(Picture(grids.pop(row.grid.sha256), caption, settings))
    return "".join(parts) + (f"<h3>First samples</h3>{_figures(pictures)}" if pictures else "")


def _table(ranking: Ranking) -> str:
    unit = f"<small>{_text(ranking.unit)}</small>"
    heads = "".join(
        f'<th scope="col"{_numeric(name)}><button type="button">{name}{unit * (name == "value")}</button></th>'
        for name in _COLUMNS
    )
    return _wide(ranking.board.title, heads, (_row(row, ranking) for row in ranking.rows))


def _wide(label: str, heads: str, rows: Iterable[str], is_sorted: bool = True) -> str:
    """A table that may be wider than the screen."""
    kind = ' class="sortable"' if is_sorted else ""
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{_text(label)}">'
        f"<table{kind}><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _line(cells: Mapping[str, str]) -> str:
    """A row of a table; each cell has the name of its column, which a phone shows beside it."""
    return "<tr>" + "".join(f'<td data-label="{name}">{_text(text)}</td>' for name, text in cells.items()) + "</tr>"


def _heads(names: Sequence[str]) -> str:
    return "".join(f'<th scope="col">{name}</th>' for name in names)


def _row(row: Row, ranking: Ranking) -> str:
    aliases = f" <strong>{_text(', '.join(row.aliases))}</strong>" if row.aliases else ""
    ours = row.rank is not None
    cells = {
        "rank": (str(row.rank or ""), str(row.rank or "")),
        "model": (row.model, f"<span>{_text(row.model)}{aliases}</span>"),
        "value": (
            repr(row.value),
            f'<span>{ranking.shown(row)}<span class="unit"> {_text(ranking.unit)}</span></span>',
        ),
        "95 % interval": ("" if row.low is None else repr(row.low), _interval(row, ranking)),
        "images": _count(row.metric.num_images if row.metric else None),
        "parameters": _count(row.version.parameters if row.version else None),
        "images seen": _count(row.version.images_seen if row.version else None),
        "source": (row.source, _text("; ".join(filter(None, [row.source or "this registry", row.note])))),
    }
    inside = "".join(
        f'<td{_numeric(name)} data-label="{name}" data-value="{_text(key)}">{shown}</td>'
        for name, (key, shown) in cells.items()
    )
    return f'<tr class="{"ours" if ours else "other"}">{inside}</tr>'


def _interval(row: Row, ranking: Ranking) -> str:
    """The interval in words, and as a bar over the scale that all rows share, with a mark at the value."""
    if row.low is None or row.high is None:
        return ""
    words = f'<span class="whole">{ranking.number(row.low)} to {ranking.number(row.high)}</span>'
    ticks = ranking.scale
    if not ticks:
        return words

    def place(value: float) -> float:
        return 100 * (value - ticks[0]) / (ticks[-1] - ticks[0])

    left, right = place(row.low), place(row.high)
    marks = "".join(
        f'<span style="left:{place(tick):.1f}%">{text}</span>'
        for tick, text in zip(ticks, tick_labels(ticks), strict=True)
    )
    return (
        f'<div>{words}<div class="interval" aria-hidden="true"><div class="bar"><i style="left:{left:.1f}%;'
        f'width:{right - left:.1f}%"></i><b style="left:{place(row.value):.1f}%"></b></div>'
        f'<div class="scale">{marks}</div></div></div>'
    )


def _gate(word: Word | None) -> str:
    """Every requirement of a gate with what was found."""
    if word is None:
        return ""
    names = ("holds", "requirement", "found")
    found = [("yes" if one.holds else "no", one.requirement, one.found) for one in word.decision.reasons]
    rows = "".join(_line(dict(zip(names, map(readable, cells), strict=True))) for cells in found)
    return (
        f"<details><summary>{_text(f'What gate {word.decision.gate} found')}</summary><table><thead>"
        f"<tr>{_heads(names)}</tr></thead><tbody>{rows}</tbody></table></details>"
    )


def _training(runs: Sequence[Run]) -> str:
    """The losses of all runs on the same axes, one chart a unit; then each run with its newest samples."""
    parts: list[str] = []
    for unit in dict.fromkeys(run.loss.unit for run in runs):
        chart = line_chart(curves_of(runs, unit), "images seen", unit)
        note = ", a bound by one noise draw each" if unit == "bits/dim" else ""
        parts.append(
            f"<p>{unit} of the training batches{note}; dashed: of held-out images.</p>{chart}" if chart else ""
        )
    cells = [_run(run) for run in runs]
    parts.append(_wide("Runs", _heads(list(cells[0])), map(_line, cells), is_sorted=False))
    previews = [
        Picture(run.preview[1], f"{run.name}, after {int(run.preview[0][7:-4]):,} images")
        for run in runs
        if run.preview
    ]
    return "".join(parts) + (f"<h3>Newest previews</h3>{_figures(previews)}" if previews else "")


def _run(run: Run) -> dict[str, str]:
    last = [points[-1][1] if points else None for points in run.loss.series]
    loss, held_out = ("" if one is None else f"{fixed(one, decimals_of(one))} {run.loss.unit}" for one in last)
    seen = f"{run.images_seen:,}" + (f" of {run.total_images:,}" if run.total_images else "")
    facts = {"run": run.path, "model": run.kind, "state": run.state}
    return facts | {"images seen": seen, "loss": loss, "held out": held_out}


def _figures(pictures: Iterable[Picture]) -> str:
    figures = "".join(
        f'<figure><img src="data:image/png;base64,{base64.b64encode(one.content).decode()}" '
        f'alt="{_text(one.caption)}"><figcaption>{_text(one.caption)}'
        + (f"<details><summary>Sampling</summary>{_definitions(one.facts.items())}</details>" if one.facts else "")
        + "</figcaption></figure>"
        for one in pictures
    )
    return f'<div class="grids">{figures}</div>'


def _count(number: int | None) -> tuple[str, str]:
    return ("", "") if number is None else (str(number), f"{number:,}")


def _numeric(name: str) -> str:
    return ' class="n"' if name in _NUMBERS else ""


def _protocol(ranking: Ranking) -> str:
    facts: dict[str, object] = {"protocol id": ranking.protocol_id or "not bound here", "unit": ranking.unit}
    facts |= ranking.protocol.model_dump(mode="json")
    return f"<details><summary>How the number is measured</summary>{_definitions(facts.items())}</details>"


def _decoding(row: Row) -> dict[str, str]:
    """Iterations of each block, if the version was calibrated."""
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


def _history(entries: Sequence[Entry]) -> str:
    events = sorted(
        ((event.time, entry.model, event) for entry in entries for event in entry.state.history),
        key=lambda item: item[:2],
        reverse=True,
    )
    names = ("time, UTC", "model", "event", "who", "why")
    cells = [
        (time[:19].replace("T", " "), model, event.kind, event.actor, event.reason)
        for time, model, event in events[:_EVENTS]
    ]
    heads = "".join(f'<th scope="col"><button type="button">{name}</button></th>' for name in names)
    left = f"<p>The newest {_EVENTS} of {len(events)}.</p>" if len(events) > _EVENTS else ""
    rows = (_line(dict(zip(names, row, strict=True))) for row in cells)
    return left + _wide("Registry history", heads, rows)


def _definitions(facts: Iterable[tuple[str, object]]) -> str:
    return "<dl>" + "".join(f"<dt>{_text(k)}</dt><dd><code>{_text(_plain(v))}</code></dd>" for k, v in facts) + "</dl>"


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items())
    return "none" if value is None else str(value)


def _text(value: str) -> str:
    return escape(value, quote=True)


def _asset(name: str) -> str:
    return resources.files("tarflow_scale.pages").joinpath(name).read_text(encoding="utf-8")
