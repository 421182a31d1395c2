"""The outcome of a check, printed as one line."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["Finding", "failed", "from_message", "ok", "skipped", "warning"]

_WIDTHS = (8, 12)


@dataclass(frozen=True)
class Finding:
    """The outcome of a check.

    Args:
        name: name of the check.
        status: ``failed`` would stop the work; ``warning`` would slow it, or may be intended.
        found: what the check found.
        advice: what to do; empty if there is nothing to do.
    """

    name: str
    status: Literal["ok", "warning", "failed", "skipped"]
    found: str
    advice: str = ""

    @property
    def line(self) -> str:
        """Status, name, finding and advice."""
        rest = f"{self.found}; {self.advice}" if self.advice else self.found
        return f"{self.status:{_WIDTHS[0]}} {self.name:{_WIDTHS[1]}} {' '.join(rest.split())}"


def ok(name: str, found: str) -> Finding:
    """A passed check."""
    return Finding(name, "ok", found)


def warning(name: str, found: str, advice: str) -> Finding:
    """The work can be done, but slowly, or not for long."""
    return Finding(name, "warning", found, advice)


def failed(name: str, found: str, advice: str) -> Finding:
    """The work would stop."""
    return Finding(name, "failed", found, advice)


def skipped(name: str, found: str) -> Finding:
    """A check that was not made."""
    return Finding(name, "skipped", found)


def from_message(name: str, message: str) -> Finding:
    """A failed check, from an error of this package, whose advice follows its last semicolon."""
    found, _, advice = message.rpartition("; ")
    return failed(name, found or message, advice if found else "")
