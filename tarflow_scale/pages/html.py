"""Rankings, pictures, curves and history as one HTML file that asks nothing of a network.

Styles, script and pictures are in the file. It sorts and folds by keyboard, follows the reader's light or dark setting,
fits a phone, and shows its numbers without a script too.
"""

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib import resources

from tarflow_scale.pages.charts import Points, line_chart
from tarflow_scale.pages.ranking import Entry, Ranking, Row

__all__ = ["Page", "html_page"]

_COLUMNS = ("rank", "model", "value", "95 % interval", "images", "parameters", "images seen", "source")
_NUMBERS = frozenset(("rank", "value", "images", "parameters", "images seen"))
_EVENTS = 200


@dataclass(frozen=True)
class Page:
    """What is shown.

    pictures: PNG by sha256. curves: bits/dim (or nats/dim) over images seen, by name of the run.
    """

    title: str
    rankings: Sequence[Ranking]
    entries: Sequence[Entry]
    pictures: Mapping[str, bytes] = field(default_factory=dict)
    curves: Mapping[str, Points] = field(default_factory=dict)
    curves_unit: str = "bits/dim"


def html_page(page: Page) -> str:
    """The whole file."""
    names = [ranking.board.name for ranking in page.rankings]
    links = [(name, ranking.board.title) for name, ranking in zip(names, page.rankings, strict=True)]
    links += [("training", "Training")] if page.curves else []
    links += [("history", "Registry history")]
    navigation = "".join(f'<li><a href="#{_text(name)}">{_text(title)}</a></li>' for name, title in links)
    pictures = dict(page.pictures)
    body = [_board(ranking, pictures) for ranking in page.rankings]
    if page.curves:
        chart = line_chart(page.curves, "images seen", page.curves_unit)
        body.append(f'<section id="training"><h2>Training</h2><p>{_text(page.curves_unit)} of the training batches, a '
                    f"bound by one noise draw each.</p>{chart}</section>")  # fmt: skip
    body.append(_history(page.entries))
    script = _asset("sort.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()  # no other script runs on the page
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        f"style-src 'unsafe-inline'; script-src 'sha256-{digest}'\">"
        f'<link rel="icon" href="data:,"><title>{_text(page.title)}</title><style>{_asset("style.css")}</style></head>'
        f'<body><header><h1>{_text(page.title)}</h1><nav aria-label="Sections"><ul>{navigation}</ul></nav></header>'
        f"<main>{''.join(body)}</main><script>{script}</script></body></html>\n"
    )


def _board(ranking: Ranking, pictures: dict[str, bytes]) -> str:
    """A section; pictures that it shows are taken out, so that each is on the page once."""
    board = ranking.board
    parts = [f'<section id="{_text(board.name)}"><h2>{_text(board.title)}</h2>']
    if not ranking.ours:
        parts.append('<p class="note">No registered version has a number by this protocol yet.</p>')
    if ranking.has_published:
        parts.append(
            '<p class="note">Published rows were measured on protocols of their own: other sample counts, references, '
            "rounding or noise. They stand in their place and carry no rank.</p>"
        )
    parts += [_table(ranking), _protocol(ranking)]
    shown = [row for row in ranking.ours if row.grid is not None and row.grid.sha256 in pictures]
    if shown:
        figures = "".join(_figure(row, pictures) for row in shown)
        for row in shown:
            pictures.pop(row.grid.sha256 if row.grid else "", None)
        parts.append(f'<h3>First samples</h3><div class="grids">{figures}</div>')
    return "".join(parts) + "</section>"


def _table(ranking: Ranking) -> str:
    heads = "".join(f'<th scope="col"{_numeric(name)}><button type="button">{name}</button></th>' for name in _COLUMNS)
    low = min((row.low for row in ranking.ours if row.low is not None), default=0.0)
    high = max((row.high for row in ranking.ours if row.high is not None), default=0.0)
    rows = "".join(_row(row, low, high, ranking.unit) for row in ranking.rows)
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{_text(ranking.board.title)}">'
        f'<table class="sortable"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _row(row: Row, low: float, high: float, unit: str) -> str:
    aliases = f" <strong>{_text(', '.join(row.aliases))}</strong>" if row.aliases else ""
    ours = row.rank is not None
    value = f"{row.value:.4f}" if ours else f"{row.value:.6g}"
    cells = {
        "rank": (str(row.rank or ""), str(row.rank or "")),
        "model": (row.model, _text(row.model) + aliases),
        "value": (repr(row.value), f"{value}<span hidden> {_text(unit)}</span>"),
        "95 % interval": ("" if row.low is None else repr(row.low), _interval(row, low, high)),
        "images": _count(row.metric.num_images if row.metric else None),
        "parameters": _count(row.version.parameters if row.version else None),
        "images seen": _count(row.version.images_seen if row.version else None),
        "source": (row.source, _text("; ".join(filter(None, [row.source or "this registry", row.note])))),
    }
    inside = "".join(
        f'<td{_numeric(name)} data-value="{_text(key)}">{shown}</td>' for name, (key, shown) in cells.items()
    )
    kind = "ours" if ours else "other"
    return f'<tr class="{kind}">{inside}</tr>'


def _interval(row: Row, low: float, high: float) -> str:
    if row.low is None or row.high is None:
        return ""
    width = (high - low) or 1.0
    left, right = (row.low - low) / width * 100, (row.high - low) / width * 100
    bar = f'<div class="bar" aria-hidden="true"><i style="left:{left:.1f}%;width:{right - left:.1f}%"></i></div>'
    return f'<span class="whole">{row.low:.4f} to {row.high:.4f}</span>{bar}'


def _count(number: int | None) -> tuple[str, str]:
    return ("", "") if number is None else (str(number), f"{number:,}")


def _numeric(name: str) -> str:
    return ' class="n"' if name in _NUMBERS else ""


def _protocol(ranking: Ranking) -> str:
    facts: dict[str, object] = {"protocol id": ranking.protocol_id or "not bound here", "unit": ranking.unit}
    facts |= ranking.protocol.model_dump(mode="json")
    return f"<details><summary>How the number is measured</summary>{_definitions(facts.items())}</details>"


def _figure(row: Row, pictures: Mapping[str, bytes]) -> str:
    assert row.grid is not None
    assert row.report is not None
    data = base64.b64encode(pictures[row.grid.sha256]).decode()
    settings = f"<details><summary>Sampling</summary>{_definitions(row.report.sampling.items())}</details>"
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="First samples of {_text(row.model)}">'
        f"<figcaption>{_text(row.model)}: {row.value:.4f}{settings}{_decoding(row)}</figcaption></figure>"
    )


def _decoding(row: Row) -> str:
    """Iterations of each block, if the version was calibrated."""
    if row.entry is None or row.version is None:
        return ""
    plans = row.entry.state.plans.get(row.version.version, [])
    if not plans:
        return ""
    plan = plans[-1]
    facts = [
        (f"block {number}", f"{mean:.1f} iterations for {block.chunk} tokens" if block.chunk > 1 else "token by token")
        for number, (block, mean) in enumerate(zip(plan.blocks, plan.iterations, strict=True), start=1)
    ]
    return (
        f"<details><summary>Iterations of each block on {_text(plan.device)}</summary>{_definitions(facts)}</details>"
    )


def _history(entries: Sequence[Entry]) -> str:
    events = sorted(
        ((event.time, entry.model, event) for entry in entries for event in entry.state.facts),
        key=lambda item: item[:2],
        reverse=True,
    )
    rows = "".join(
        f"<tr><td>{_text(time)}</td><td>{_text(model)}</td><td>{_text(event.kind)}</td><td>{_text(event.actor)}</td>"
        f"<td>{_text(event.reason)}</td></tr>"
        for time, model, event in events[:_EVENTS]
    )
    heads = "".join(
        f'<th scope="col"><button type="button">{name}</button></th>'
        for name in ("time", "model", "event", "who", "why")
    )
    left = f"<p>The newest {_EVENTS} of {len(events)}.</p>" if len(events) > _EVENTS else ""
    return (
        f'<section id="history"><h2>Registry history</h2>{left}<div class="wide" tabindex="0" role="region" '
        f'aria-label="Registry history"><table class="sortable"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody>'
        f"</table></div></section>"
    )


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
