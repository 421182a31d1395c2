"""What a person sees on a terminal or in a log file: progress, tables, text without control characters."""

import sys
import time
import unicodedata
from typing import Any, Self

__all__ = ["ProgressBar", "printable", "progress_bar", "table"]

_FIRST_LINE_SECONDS, _LINE_SECONDS = 2.0, 60.0


_LEAST_RATED_SECONDS = 1.0
"""Of work that says anything about its speed."""


def progress_bar(
    total: int, description: str, unit: str = "images", initial: int = 0, enabled: bool = True
) -> "ProgressBar":
    """The progress of some work, see `ProgressBar`; nothing is shown unless ``enabled``."""
    return ProgressBar(total, description, unit, initial, enabled)


class ProgressBar:
    """A bar on a terminal, and lines that stay: at most one a minute, more often in the first minute.

    In a file, such as the log of a scheduler, there are lines alone; work that is done within two seconds has none.
    On a terminal there are lines only for work that has facts to tell, above the bar.

    Args:
        total: of what `update` counts.
        description: of the work, a word or two.
        unit: what is counted, in the plural.
        initial: how much is done already.
        enabled: whether to show anything.
    """

    def __init__(self, total: int, description: str, unit: str, initial: int, enabled: bool) -> None:
        self._total, self._description, self._unit, self._done = total, description, unit, initial
        self._enabled = enabled
        self._bar = self._on_terminal() if enabled and sys.stderr.isatty() else None
        self._facts = ""
        self._started = self._latest = time.monotonic()
        self._told = initial
        self._rated: tuple[float, int] | None = None  # when, and how much was done: from there speed is measured
        self._pause = _FIRST_LINE_SECONDS

    def _on_terminal(self) -> Any:
        from tqdm import tqdm  # here, because a tenth of a second is much for verbs that show no bar

        return tqdm(
            total=self._total,
            desc=self._description,
            unit=f" {self._unit}",
            initial=self._done,
            file=sys.stderr,
            mininterval=0.2,
            maxinterval=1.0,
            dynamic_ncols=True,
        )

    def tell(self, facts: str, brief: str | None = None) -> None:
        """What the next line says beside the counts; ``brief`` is for the bar, which has less room."""
        self._facts = facts
        if self._bar is not None:
            self._bar.set_postfix_str(facts if brief is None else brief, refresh=False)

    def update(self, number: int) -> None:
        """Count what was done since the last call."""
        self._done += number
        if self._rated is None:  # what went before was start-up: of workers, of a compiler
            self._rated = time.monotonic(), self._done
            if self._bar is not None:
                self._bar.unpause()
                self._bar.n = self._bar.initial = self._bar.last_print_n = self._done
                self._bar.refresh()
        elif self._bar is not None:
            self._bar.update(number)
        if self._enabled and time.monotonic() >= self._latest + self._pause and (self._facts or self._bar is None):
            self._write_line()

    def close(self) -> None:
        """Show the end: the last line, unless there was none or it is there."""
        if self._enabled and self._latest > self._started and self._done > self._told:
            self._write_line()
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write_line(self) -> None:
        now = time.monotonic()
        since, before = self._rated or (now, self._done)
        rate = (self._done - before) / (now - since) if now - since >= _LEAST_RATED_SECONDS else 0.0
        speed = f", {rate:,.{0 if rate >= 10 else 2}f} a second" if rate > 0 else ""
        left = f", {_clock((self._total - self._done) / rate)} left" if rate > 0 and self._done < self._total else ""
        line = (
            f"{self._description}: {self._done:,} of {self._total:,} {self._unit} "
            f"({self._done / max(self._total, 1):.0%}){speed}, "
            f"{_clock(now - self._started)} passed{left}{self._facts and '; '}{self._facts}"
        )
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)
        self._pause = min(2 * self._pause, _LINE_SECONDS)
        self._latest, self._told = now, self._done
        self._rated = now, self._done


def _clock(seconds: float) -> str:
    """``12 s``, ``3 min 20 s``, ``5 h 07 min``, ``3 d 4 h``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole // 60 % 60:02d} min"
    return f"{whole // 86400} d {whole // 3600 % 24} h"


def table(rows: list[tuple[str, ...]], header: tuple[str, ...]) -> str:
    """A text table with columns as wide as they need to be."""
    header, rows = tuple(map(printable, header)), [tuple(map(printable, row)) for row in rows]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    head = "  ".join(cell.ljust(width) for cell, width in zip(header, widths, strict=True)).rstrip()
    return "\n".join([head, "  ".join("-" * width for width in widths), *lines])


def printable(text: str) -> str:
    """Text that does to a terminal what it says: control characters, which names from files may hold, are escaped."""
    return "".join(ascii(c)[1:-1] if unicodedata.category(c).startswith("C") else c for c in text)
