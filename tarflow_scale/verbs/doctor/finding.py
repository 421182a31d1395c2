"""The outcome of a check, which is printed as one line."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["Finding", "failed", "from_message", "ok", "skipped", "warning"]

_WIDTHS = (8, 12)


@dataclass(frozen=True)
class Finding:
    """The outcome of a check.

    Args:
        name: name of the check.
        status: ``failed`` if jobs would stop; ``warning`` if they would be slow, or might fail later; ``skipped`` if
            the check was not run; otherwise ``ok``.
        found: description of the outcome.
        advice: what the user can do; empty if nothing is needed.
    """

    name: str
    status: Literal["ok", "warning", "failed", "skipped"]
    found: str
    advice: str = ""

    @property
    def line(self) -> str:
        """The line to print: status, name, outcome and advice."""
        rest = f"{self.found}; {self.advice}" if self.advice else self.found
        return f"{self.status:{_WIDTHS[0]}} {self.name:{_WIDTHS[1]}} {' '.join(rest.split())}"


def ok(name: str, found: str) -> Finding:
    """The outcome of a check that passed."""
    return Finding(name, "ok", found)


def warning(name: str, found: str, advice: str) -> Finding:
    """The outcome of a check that found a problem: jobs would be slow or might fail later."""
    return Finding(name, "warning", found, advice)


def failed(name: str, found: str, advice: str) -> Finding:
    """The outcome of a check that found a problem that would stop jobs."""
    return Finding(name, "failed", found, advice)


def skipped(name: str, found: str) -> Finding:
    """The outcome of a check that was not run."""
    return Finding(name, "skipped", found)


def from_message(name: str, message: str) -> Finding:
    """Make a failed finding from an error message of this package. The text after its last semicolon is the advice."""
    found, _, advice = message.rpartition("; ")
    return failed(name, found or message, advice if found else "")
