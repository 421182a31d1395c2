"""Configuration of the verb ``report``, and leaderboard files."""

from typing import Self

from pydantic import Field, model_validator

from tarflow_scale.config.base import Root, Section
from tarflow_scale.config.verb import Verb
from tarflow_scale.config.versions import Name

__all__ = ["VERB", "LeaderboardConfig", "PublishedRow", "ReportConfig", "ReportOutputConfig"]


class PublishedRow(Section):
    """A published number, which was measured by another protocol."""

    model: str
    """Name and size of the model."""
    value: float
    source: str
    """Where the number is published: paper and table, or URL."""
    note: str = ""
    """Remarks on how the number was measured. On a leaderboard of bounds, they must contain the word bound."""


class LeaderboardConfig(Section):
    """A leaderboard: one metric on one data set."""

    name: Name
    title: str
    protocol: str
    """The protocol file; only numbers measured by this protocol become rows."""
    protocol_id: str | None = Field(default=None, min_length=8)
    """Required protocol id of the rows, or its first digits. With None, rows with different ids are an error."""
    published: tuple[PublishedRow, ...] = ()


class ReportOutputConfig(Section):
    """The content of the report, and where it is written."""

    path: str
    """Folder or URL for ``index.html`` and ``leaderboard.md``."""
    leaderboards: tuple[str, ...] = ()
    """Leaderboard files, in the order in which they are shown; they need ``registries``."""
    registries: tuple[str, ...] = ()
    """Registries; the report ranks their models and shows their history."""
    gate: str | None = None
    """Gate file, see ``evals/gates/``. If the best version was not promoted, the report shows what the gate decides."""
    runs: tuple[str, ...] = ()
    """Folders of training runs, finished or not; the report shows their losses and newest samples."""
    generated: tuple[str, ...] = ()
    """Folders that ``generate`` wrote; the report shows the first samples."""
    title: str = "Report"

    @model_validator(mode="after")
    def _has_something_to_show(self) -> Self:
        if self.leaderboards and not self.registries:
            raise ValueError("leaderboards need registries (got none); set report.registries")
        if not (self.registries or self.runs or self.generated):
            raise ValueError("a report needs runs, registries or generated (got none); set report.runs, for example")
        return self


class ReportConfig(Root):
    """Show registries and training runs as a Markdown file and as one HTML file that needs no network."""

    report: ReportOutputConfig


VERB = Verb(
    "verbs.report",
    ReportConfig,
    "write leaderboards, samples and loss curves as Markdown and as a page",
    "tarflow-scale report configs/report/digits.yaml",
)
