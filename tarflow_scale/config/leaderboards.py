"""Leaderboards: the files in ``evals/leaderboards/`` that set published numbers beside those of registries."""

from pydantic import Field

from tarflow_scale.config.base import Section
from tarflow_scale.config.sections import Name

__all__ = ["LeaderboardConfig", "PublishedRow", "ReportOutputConfig"]


class PublishedRow(Section):
    """A number that somebody printed, on a protocol of their own."""

    model: str
    """Name and size of the model."""
    value: float
    source: str
    """Where it is printed: paper and table, or address."""
    note: str = ""
    """What is known of how it was measured."""


class LeaderboardConfig(Section):
    """One measure on one data set."""

    name: Name
    title: str
    protocol: str
    """The protocol file; of registries only numbers by it are rows."""
    protocol_id: str | None = Field(default=None, min_length=8)
    """The id that rows must carry, or its first digits, as reports show them; None takes the id that all rows share,
    and refuses several."""
    published: tuple[PublishedRow, ...] = ()


class ReportOutputConfig(Section):
    """What is reported, and where it is written."""

    path: str
    """Folder or URL for ``index.html`` and ``leaderboard.md``."""
    leaderboards: tuple[str, ...] = Field(min_length=1)
    """Leaderboard files, in the order of the page."""
    registries: tuple[str, ...] = Field(min_length=1)
    """Registries whose models are rows."""
    runs: tuple[str, ...] = ()
    """Folders of training runs whose curves are drawn."""
    title: str = "Leaderboards"
