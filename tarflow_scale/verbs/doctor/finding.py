"""What a check says: one line."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["Finding", "failed", "from_message", "ok", "skipped", "warning"]

_WIDTHS = (8, 12)


@dataclass(frozen=True)
class Finding:
    """The outcome of a check.

    Args:
        name: of what was looked at.
        status: ``failed`` is what would stop the work, ``warning`` what would slow it or may be meant.
        found: what was there.
        advice: what to do; empty where there is nothing to do.
    """

    name: str
    status: Literal["ok", "warning", "failed", "skipped"]
    found: str
    advice: str = ""

    @property
    def line(self) -> str:
        """Status, name, and the rest."""
        rest = f"{self.found}; {self.advice}" if self.advice else self.found
        return f"{self.status:{_WIDTHS[0]}} {self.name:{_WIDTHS[1]}} {' '.join(rest.split())}"


def ok(name: str, found: str) -> Finding:
    """All well."""
    return Finding(name, "ok", found)


def warning(name: str, found: str, advice: str) -> Finding:
    """The work can be done, but not well, or not for long."""
    return Finding(name, "warning", found, advice)


def failed(name: str, found: str, advice: str) -> Finding:
    """The work would stop."""
    return Finding(name, "failed", found, advice)


def skipped(name: str, found: str) -> Finding:
    """Nothing was asked."""
    return Finding(name, "skipped", found)


def from_message(name: str, message: str) -> Finding:
    """Failed with an error of this package, which says after its last semicolon what to do."""
    found, _, advice = message.rpartition("; ")
    return failed(name, found or message, advice if found else "")
