"""Output for a terminal or a log file: progress bars, tables, escaped control characters."""

import sys
import time
import unicodedata
from typing import Any, Self

__all__ = ["ProgressBar", "printable", "table"]

_FIRST_LINE_SECONDS, _LINE_SECONDS = 2.0, 60.0
_LEAST_RATED_SECONDS = 1.0
"""Speed is shown only if it was measured over at least this time."""


class ProgressBar:
    """Show the progress of work on standard error, as a bar on a terminal or as lines of text in a file.

    A file, such as the log of a scheduler, gets a line per minute, and more lines in the first minute; work that takes
    less than two seconds gets no line. On a terminal, lines are printed above the bar only if `tell` was called.

    Args:
        total: the count at the end.
        description: the work, in a word or two.
        unit: plural noun for the counted things.
        initial: the count at the start.
        enabled: whether to print anything.
    """

    def __init__(
        self, total: int, description: str, unit: str = "images", initial: int = 0, enabled: bool = True
    ) -> None:
        self._total, self._description, self._unit, self._done = total, description, unit, initial
        self._enabled = enabled
        self._bar = self._on_terminal() if enabled and sys.stderr.isatty() else None
        self._text = ""
        self._started = self._latest = time.monotonic()
        self._shown = initial
        self._rated: tuple[float, int] | None = None  # time and count from which speed is measured
        self._pause = _FIRST_LINE_SECONDS

    def _on_terminal(self) -> Any:
        from tqdm import tqdm  # imported here, because the import takes 0.1 s and many verbs show no bar

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

    def tell(self, text: str, brief: str | None = None) -> None:
        """Set the text that follows the counts in the next line; ``brief`` is a shorter text for the bar."""
        self._text = text
        if self._bar is not None:
            self._bar.set_postfix_str(text if brief is None else brief, refresh=False)

    def update(self, number: int) -> None:
        """Add ``number`` to the count."""
        self._done += number
        if self._rated is None:  # the time until now is start-up of workers or compilation
            self._rated = time.monotonic(), self._done
            if self._bar is not None:
                self._bar.unpause()
                self._bar.n = self._bar.initial = self._bar.last_print_n = self._done
                self._bar.refresh()
        elif self._bar is not None:
            self._bar.update(number)
        if self._enabled and time.monotonic() >= self._latest + self._pause and (self._text or self._bar is None):
            self._write_line()

    def close(self) -> None:
        """Close the bar. Print a final line if there were lines before and the count has changed since the last one."""
        if self._enabled and self._latest > self._started and self._done > self._shown:
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
        speed = f", {rate:,.{0 if rate >= 10 else 2}f} per second" if rate > 0 else ""
        left = f", {_clock((self._total - self._done) / rate)} left" if rate > 0 and self._done < self._total else ""
        line = (
            f"{self._description}: {self._done:,} of {self._total:,} {self._unit} "
            f"({self._done / max(self._total, 1):.0%}){speed}, "
            f"{_clock(now - self._started)} passed{left}{self._text and '; '}{self._text}"
        )
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)
        self._pause = min(2 * self._pause, _LINE_SECONDS)
        self._latest, self._shown = now, self._done
        self._rated = now, self._done


def _clock(seconds: float) -> str:
    """Format a duration: ``12 s``, ``3 min 20 s``, ``5 h 07 min``, ``3 d 4 h``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole // 60 % 60:02d} min"
    return f"{whole // 86400} d {whole // 3600 % 24} h"


def table(rows: list[tuple[str, ...]], header: tuple[str, ...]) -> str:
    """Format a text table; each column is as wide as its longest cell."""
    header, rows = tuple(map(printable, header)), [tuple(map(printable, row)) for row in rows]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    head = "  ".join(cell.ljust(width) for cell, width in zip(header, widths, strict=True)).rstrip()
    return "\n".join([head, "  ".join("-" * width for width in widths), *lines])


def printable(text: str) -> str:
    """Escape the control characters of a text; file names, for example, may contain them."""
    return "".join(ascii(c)[1:-1] if unicodedata.category(c).startswith("C") else c for c in text)
