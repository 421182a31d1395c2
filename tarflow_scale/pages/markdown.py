"""Rankings as Markdown tables."""

from collections.abc import Sequence

from tarflow_scale.pages.ranking import Ranking, Row
from tarflow_scale.runtime.console import printable

__all__ = ["cell", "markdown"]


def markdown(title: str, answers: Sequence[str], rankings: Sequence[Ranking]) -> str:
    """The Markdown document: the title, the sentences ``answers``, and a table for each ranking."""
    lines = [f"# {cell(title)}", ""]
    for sentence in answers:
        lines += [cell(sentence), ""]
    for ranking in rankings:
        lines += [f"## {cell(ranking.board.title)}", ""]
        if ranking.protocol_id:
            lines += [f"Protocol `{ranking.protocol.name}`, id `{ranking.protocol_id[:12]}`, {ranking.unit}.", ""]
        lines += [
            "| rank | model | value | 95 % interval | images | parameters | source |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [_line(row, ranking) for row in ranking.rows]
        if ranking.has_published:
            lines += ["", "Published numbers were measured by other protocols, so they have no rank."]
        lines.append("")
    return "\n".join(lines)


def _line(row: Row, ranking: Ranking) -> str:
    ends = [ranking.number(end) for end in (row.low, row.high) if end is not None]
    images = f"{row.metric.num_images:,}" if row.metric else ""
    parameters = f"{row.version.parameters:,}" if row.version else ""
    aliases = f" ({', '.join(row.aliases)})" if row.aliases else ""
    source = f"{row.source}; {row.note}" if row.note else row.source
    cells = [
        str(row.rank or ""),
        row.model + aliases,
        ranking.shown(row),
        " to ".join(ends),
        images,
        parameters,
        source,
    ]
    return "| " + " | ".join(map(cell, cells)) + " |"


def cell(text: str) -> str:
    """Put a text on one line, and escape it for tables, headings and terminals."""
    return printable(text.replace("\n", " ")).replace("|", "\\|").replace("<", "&lt;")
