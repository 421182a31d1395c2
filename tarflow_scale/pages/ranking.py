"""Rows of a leaderboard: numbers from registries with one protocol id, published numbers and baselines.

Two numbers are comparable only if they have the same protocol id, so all ranked rows must share it. Published numbers
were measured by other protocols; they are sorted by value among the other rows, but have no rank. Baselines, which an
evaluation measured by the same protocol, have no rank either.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tarflow_scale.config.protocols import BoundProtocol, PerImageProtocol, SampledProtocol
from tarflow_scale.config.report import LeaderboardConfig
from tarflow_scale.errors import ConfigError
from tarflow_scale.pages.numbers import decimals_of, fixed, round_ticks
from tarflow_scale.records import FileRecord, MetricsReport, MetricValue, ModelVersion
from tarflow_scale.registry import ModelState

__all__ = ["Entry", "Ranking", "Row", "rank"]

_STANDARD_NORMAL_95 = 1.96
_MOST_TICKS = 5
_BASELINE = "baseline, same protocol"
_BASELINES = {"gaussian": "full-covariance Gaussian", "real": "real training images"}


@dataclass(frozen=True)
class Entry:
    """A model of a registry."""

    registry: str
    model: str
    state: ModelState


@dataclass(frozen=True)
class Row:
    """A row of a ranking. A row from a registry has a rank and a version; a baseline or published row has a source."""

    model: str
    value: float
    rank: int | None = None
    low: float | None = None
    high: float | None = None
    source: str = ""
    note: str = ""
    version: ModelVersion | None = None
    aliases: tuple[str, ...] = ()
    metric: MetricValue | None = None
    report: MetricsReport | None = None
    entry: Entry | None = None

    @property
    def grid(self) -> FileRecord | None:
        """File record of the sample grid from the report that contains the row's number; None if there is none."""
        return self.report.grid if self.report else None


@dataclass(frozen=True)
class Ranking:
    """A leaderboard with its rows, best first."""

    board: LeaderboardConfig
    protocol: PerImageProtocol | SampledProtocol
    rows: tuple[Row, ...]

    @property
    def ours(self) -> list[Row]:
        """Rows from registries, which have a rank."""
        return [row for row in self.rows if row.rank is not None]

    @property
    def to_beat(self) -> list[Row]:
        """Baselines that a model should beat: all except real images, which no model beats."""
        return [row for row in self.rows if row.source == _BASELINE and row.model != _BASELINES["real"]]

    @property
    def decimals(self) -> int:
        """Number of decimals of all numbers on the board; the best number gets four significant digits."""
        first = next(iter([*self.ours, *self.rows]), None)
        return 3 if first is None else decimals_of(first.value)

    def number(self, value: float) -> str:
        """Format a number with the decimals of the board."""
        return fixed(value, self.decimals)

    def shown(self, row: Row) -> str:
        """Format the number of a row. Published numbers are not padded with zeros to the decimals of the board."""
        text = self.number(row.value)
        return (
            text if row.rank is not None or row.source == _BASELINE or "." not in text else text.rstrip("0").rstrip(".")
        )

    @property
    def scale(self) -> list[float]:
        """Round axis ticks that enclose the 95 % intervals of all ranked rows; empty if there are no intervals."""
        ends = [end for row in self.ours for end in (row.low, row.high) if end is not None]
        return round_ticks(min(ends), max(ends), _MOST_TICKS) if ends and max(ends) > min(ends) else []

    @property
    def has_published(self) -> bool:
        """Whether the board has published numbers."""
        return bool(self.board.published)

    @property
    def unit(self) -> str:
        """Unit of the numbers; empty if there are no ranked rows."""
        return next((row.metric.unit for row in self.ours if row.metric), "")

    @property
    def protocol_id(self) -> str:
        """Protocol id of all ranked rows; empty if there are none."""
        return next((row.metric.protocol_id for row in self.ours if row.metric), "")


def rank(board: LeaderboardConfig, protocol: PerImageProtocol | SampledProtocol, entries: Sequence[Entry]) -> Ranking:
    """Rank the newest number of every version, and add baselines and published numbers.

    Raises:
        ConfigError: the rows from registries have different protocol ids, or bounds are not called bounds.
    """
    _check_bounds(board, protocol)
    names = [entry.model for entry in entries]
    measured = [row for entry in entries for row in _rows(board, protocol, entry, names.count(entry.model) > 1)]
    ids = {row.metric.protocol_id: row.model for row in measured if row.metric}
    if len(ids) > 1:
        names = " and ".join(f"{model} ({identity[:12]})" for identity, model in sorted(ids.items()))
        raise ConfigError(
            f"leaderboard {board.name} would mix protocol ids (got {names}), which differ in images or extractor; "
            f"evaluate all on the same data, or set protocol_id in the leaderboard"
        )
    sign = -1 if protocol.higher_is_better else 1
    ours = sorted(measured, key=lambda row: sign * row.value)
    numbered = [replace(row, rank=1 + sum(sign * other.value < sign * row.value for other in ours)) for row in ours]
    published = [Row(row.model, row.value, source=row.source, note=row.note) for row in board.published]
    every = [*numbered, *_baselines(protocol, ours), *published]
    return Ranking(board, protocol, tuple(sorted(every, key=lambda row: sign * row.value)))


def _check_bounds(board: LeaderboardConfig, protocol: PerImageProtocol | SampledProtocol) -> None:
    """Check that a board of bounds says so, and does not compare them with published numbers that are no bounds."""
    if not isinstance(protocol, BoundProtocol):
        return
    if "bound" not in board.title.lower():
        raise ConfigError(
            f"leaderboard {board.name} must have the word bound in its title, because protocol {protocol.name} "
            f"measures a bound (got {board.title!r}); change the title"
        )
    for row in board.published:
        if "bound" not in row.note.lower():
            raise ConfigError(
                f"leaderboard {board.name} may contain only published numbers with the word bound in their note, "
                f"because its protocol measures a bound (got {row.note!r} for {row.model}); remove the row, or correct "
                f"the note"
            )


def _baselines(protocol: PerImageProtocol | SampledProtocol, ours: Sequence[Row]) -> list[Row]:
    """Rows of the baselines. Each is shown once, because it depends on protocol and reference, not on the model."""
    values = {
        kind: row.report.baselines[f"{kind}_{protocol.name}"]
        for row in ours
        for kind in _BASELINES
        if row.report is not None and f"{kind}_{protocol.name}" in row.report.baselines
    }
    return [Row(_BASELINES[kind], value, source=_BASELINE) for kind, value in values.items()]


def _rows(
    board: LeaderboardConfig, protocol: PerImageProtocol | SampledProtocol, entry: Entry, is_namesake: bool
) -> list[Row]:
    """Rows of one model. ``is_namesake`` is true if a model in another registry has the same name."""
    rows: list[Row] = []
    for number, version in entry.state.versions.items():
        if number in entry.state.retired:
            continue
        by_protocol = [
            (metric, report)
            for report in entry.state.reports.get(number, [])
            for metric in report.metrics.values()
            if metric.protocol_digest == protocol.digest and metric.protocol_id.startswith(board.protocol_id or "")
        ]
        if not by_protocol:
            continue
        metric, report = by_protocol[-1]
        half = _STANDARD_NORMAL_95 * metric.standard_error if metric.standard_error is not None else None
        rows.append(
            Row(
                model=f"{entry.model}@{number}" + (f" of {entry.registry}" if is_namesake else ""),
                value=metric.value,
                rank=0,
                low=None if half is None else metric.value - half,
                high=None if half is None else metric.value + half,
                version=version,
                aliases=tuple(sorted(alias for alias, held in entry.state.aliases.items() if held == number)),
                metric=metric,
                report=report,
                entry=entry,
            )
        )
    return rows
