"""Reports: leaderboards that set published numbers beside those of registries, and pages of runs."""

from typing import Self

from pydantic import Field, model_validator

from tarflow_scale.config.base import Root, Section
from tarflow_scale.config.verb import Verb
from tarflow_scale.config.versions import Name

__all__ = ["VERB", "LeaderboardConfig", "PublishedRow", "ReportConfig", "ReportOutputConfig"]


class PublishedRow(Section):
    """A published number, measured by a protocol of its own."""

    model: str
    """Name and size of the model."""
    value: float
    source: str
    """Where it is published: paper and table, or URL."""
    note: str = ""
    """What is known of how it was measured."""


class LeaderboardConfig(Section):
    """One measure on one data set."""

    name: Name
    title: str
    protocol: str
    """The protocol file; only numbers by this protocol become rows."""
    protocol_id: str | None = Field(default=None, min_length=8)
    """The protocol id of the rows, or its first digits; None takes the id that all rows share, and refuses different
    ids."""
    published: tuple[PublishedRow, ...] = ()


class ReportOutputConfig(Section):
    """What is reported, and where it is written."""

    path: str
    """Folder or URL for ``index.html`` and ``leaderboard.md``."""
    leaderboards: tuple[str, ...] = ()
    """Leaderboard files, in the order of the page; they need ``registries``."""
    registries: tuple[str, ...] = ()
    """Registries whose models are rows, and whose history is shown."""
    gate: str | None = None
    """Gate file; its decision on the best version is shown if that version was not promoted. See ``evals/gates/``."""
    runs: tuple[str, ...] = ()
    """Folders of training runs, finished or not; their loss and newest samples are shown."""
    generated: tuple[str, ...] = ()
    """Folders that ``generate`` wrote, whose first samples are shown."""
    title: str = "Report"

    @model_validator(mode="after")
    def _has_something_to_show(self) -> Self:
        if self.leaderboards and not self.registries:
            raise ValueError("leaderboards need registries (got none); set report.registries")
        if not (self.registries or self.runs or self.generated):
            raise ValueError("a report needs runs, registries or generated (got none); set report.runs, for example")
        return self


class ReportConfig(Root):
    """Registries and runs in; leaderboards out, as Markdown and as one HTML page that needs no network."""

    report: ReportOutputConfig


VERB = Verb(
    "verbs.report",
    ReportConfig,
    "write leaderboards, samples and loss curves as Markdown and as a page",
    "tarflow-scale report configs/report/digits.yaml",
)
