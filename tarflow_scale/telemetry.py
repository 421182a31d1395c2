"""What a person and a script see of a run: a log, its progress, package versions, git commit, peak memory."""

import json
import math
import os
import resource
import subprocess
import sys
import time
import unicodedata
import uuid
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib import metadata, util
from pathlib import Path
from typing import IO, Any, Self

from tarflow_scale.errors import ConfigError

__all__ = [
    "JsonLog",
    "Log",
    "ProgressBar",
    "check_log_packages",
    "git_commit",
    "open_log",
    "package_versions",
    "peak_memory_bytes",
    "printable",
    "progress_bar",
    "table",
]

_FIRST_LINE_SECONDS, _LINE_SECONDS = 2.0, 60.0
_LEAST_RATED_SECONDS = 1.0
"""Of work that says anything about its speed."""
_PACKAGES = ("tarflow-scale", "torch", "deepspeed", "webdataset", "torch-fidelity", "einops", "ray", "fsspec", "numpy")
_WANDB_ID = "wandb-id.json"


class JsonLog:
    """Append-only JSON lines; a line is on disk when `write` returns, and a torn last line is dropped on reopening.

    Args:
        path: the file.
        keep_until_images: on resuming, lines with ``images`` beyond this are removed, because they will be written
            again; None keeps all.
    """

    def __init__(self, path: Path, keep_until_images: int | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = _whole_lines(path, math.inf if keep_until_images is None else keep_until_images)
        staged = path.with_name(f".{path.name}.partial")
        staged.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        staged.replace(path)  # at once, so that a kill here loses nothing
        self._file: IO[str] = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Log:
    """Records with ``images``, to several places at once; to none on ranks that do not log.

    Args:
        sinks: the places.
    """

    def __init__(self, sinks: Sequence[Callable[[Mapping[str, Any]], None]] = ()) -> None:
        self._sinks = sinks

    def write(self, record: Mapping[str, Any]) -> None:
        """Write one record."""
        for sink in self._sinks:
            sink(record)


def check_log_packages(tensorboard: bool, wandb_project: str | None) -> None:
    """See that what is to be logged to is installed.

    Raises:
        ConfigError: it is not.
    """
    for wanted, package, key in (
        (tensorboard, "tensorboard", "logging.tensorboard"),
        (wandb_project is not None, "wandb", "logging.wandb_project"),
    ):
        if wanted and util.find_spec(package) is None:
            raise ConfigError(f"{key} needs the package {package} (got none installed); pip install {package}")


@contextmanager
def open_log(
    folder: Path, keep_until_images: int, tensorboard: bool, wandb_project: str | None, facts: Mapping[str, Any]
) -> Generator[Log]:
    """``log.jsonl``, and if asked for TensorBoard's events and a run of Weights & Biases.

    Args:
        folder: of the run.
        keep_until_images: what lies beyond will be logged again.
        tensorboard: whether to write ``tensorboard/``.
        wandb_project: project, or None.
        facts: the configuration that Weights & Biases shows.
    """
    with ExitStack() as stack:
        sinks: list[Callable[[Mapping[str, Any]], None]] = []
        sinks.append(stack.enter_context(JsonLog(folder / "log.jsonl", keep_until_images)).write)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(folder / "tensorboard"), purge_step=keep_until_images + 1)
            stack.callback(writer.close)
            sinks.append(lambda record: _each_number(record, writer.add_scalar))
        if wandb_project is not None:
            import wandb  # pyright: ignore[reportMissingImports]

            run = wandb.init(
                project=wandb_project,
                name=folder.resolve().name,
                id=_wandb_id(folder),
                resume="allow",
                dir=str(folder),
                config=dict(facts),
            )
            stack.callback(run.finish)
            sinks.append(lambda record: run.log(dict(record), step=record["images"]))
        yield Log(sinks)


def _wandb_id(folder: Path) -> str:
    """The id of this folder's run of Weights & Biases: random, made once, and kept in ``wandb-id.json``.

    A folder that was moved, restored or mounted elsewhere has the path or the inode that the file names, and goes on
    with its run. A copy has neither and becomes a run of its own; otherwise two runs would write to one.

    Raises:
        ConfigError: the file is damaged.
    """
    kept, inode = folder / _WANDB_ID, folder.stat().st_ino
    path = str(folder.resolve())
    if kept.exists():
        try:
            before = json.loads(kept.read_text(encoding="utf-8"))
            identity, is_copy = str(before["id"]), path != before["path"] and inode != before["inode"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{kept} must name a run of Weights & Biases (got {type(error).__name__}); remove it to start another"
            ) from error
        if is_copy:
            print(f"{folder} is a copy of {before['path']}: a new run of Weights & Biases", file=sys.stderr, flush=True)
            identity = uuid.uuid4().hex
    elif (folder / "wandb").is_dir():  # of an earlier version of this package, which took the name
        identity = folder.resolve().name
    else:
        identity = uuid.uuid4().hex
    staged = kept.with_name(f".{kept.name}.partial")
    with staged.open("w", encoding="utf-8") as file:
        json.dump({"id": identity, "path": path, "inode": inode}, file)
        file.flush()
        os.fsync(file.fileno())
    staged.replace(kept)
    return identity


def _each_number(record: Mapping[str, Any], write: Callable[[str, float, int], None]) -> None:
    for name, value in record.items():
        if name != "images" and isinstance(value, int | float):
            write(name, value, record["images"])


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


def package_versions() -> dict[str, str]:
    """Installed versions of what decides a result."""
    found = {"python": sys.version.split()[0]}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def git_commit() -> str:
    """Commit of the code that runs, with ``+`` when files differ from it.

    Outside a checkout it is what ``TARFLOW_SCALE_COMMIT`` says, as the images in ``docker/`` do, or ``unknown``.
    """
    folder = Path(__file__).parent
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("TARFLOW_SCALE_COMMIT") or "unknown"
    return commit + ("+" if changed else "")


def peak_memory_bytes(device: str = "cpu") -> int:
    """Most memory that was in use so far: resident size of this process, or what torch allocated on ``cuda``."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


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


def _git(folder: Path, *arguments: str) -> str:
    result = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=10)
    return result.stdout.strip()


def _whole_lines(path: Path, until_images: float) -> list[str]:
    kept: list[str] = []
    for line in path.read_text(encoding="utf-8").split("\n") if path.exists() else ():
        with suppress(json.JSONDecodeError):
            record = json.loads(line)
            if isinstance(record, dict) and record.get("images", 0) <= until_images:
                kept.append(line)
    return kept
