"""Rankings as Markdown tables."""

from collections.abc import Sequence

from tarflow_scale.pages.ranking import Ranking, Row
from tarflow_scale.telemetry import printable

__all__ = ["markdown"]


def markdown(title: str, rankings: Sequence[Ranking]) -> str:
    """The whole document."""
    lines = [f"# {_cell(title)}", ""]
    for ranking in rankings:
        lines += [f"## {_cell(ranking.board.title)}", ""]
        if ranking.protocol_id:
            lines += [f"Protocol `{ranking.protocol.name}`, id `{ranking.protocol_id[:12]}`, {ranking.unit}.", ""]
        lines += [
            "| rank | model | value | 95 % interval | images | parameters | source |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [_line(row) for row in ranking.rows]
        if ranking.has_published:
            lines += ["", "Published numbers are on protocols of their own, so they carry no rank."]
        lines.append("")
    return "\n".join(lines)


def _line(row: Row) -> str:
    interval = f"{row.low:.4f} to {row.high:.4f}" if row.low is not None and row.high is not None else ""
    images = f"{row.metric.num_images:,}" if row.metric else ""
    parameters = f"{row.version.parameters:,}" if row.version else ""
    aliases = f" ({', '.join(row.aliases)})" if row.aliases else ""
    source = f"{row.source}; {row.note}" if row.note else row.source
    value = f"{row.value:.4f}" if row.rank is not None else f"{row.value:.6g}"
    cells = [str(row.rank or ""), row.model + aliases, value, interval, images, parameters, source]
    return "| " + " | ".join(map(_cell, cells)) + " |"


def _cell(text: str) -> str:
    """Text that no table, heading or terminal breaks on."""
    return printable(text.replace("\n", " ")).replace("|", "\\|").replace("<", "&lt;")
