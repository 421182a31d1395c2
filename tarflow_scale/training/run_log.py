"""The log of a run: JSON lines, and optionally TensorBoard and Weights & Biases."""

import json
import math
import os
import sys
import uuid
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from importlib import util
from pathlib import Path
from typing import IO, Any, Self

from tarflow_scale.errors import ConfigError

__all__ = ["JsonLog", "Log", "check_log_packages", "open_log"]

Log = Callable[[Mapping[str, Any]], None]
"""A function that writes a record."""
_WANDB_ID = "wandb-id.json"


class JsonLog:
    """Append-only JSON lines. `write` flushes each line to the file; incomplete lines are dropped on reopening.

    Args:
        path: the file.
        keep_until_images: lines with a larger value of ``images`` are removed, because a resumed run writes them again;
            None keeps all.
    """

    def __init__(self, path: Path, keep_until_images: int | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = _whole_lines(path, math.inf if keep_until_images is None else keep_until_images)
        staged = path.with_name(f".{path.name}.partial")
        staged.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        staged.replace(path)  # atomic, so that a kill here loses nothing
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


def check_log_packages(tensorboard: bool, wandb_project: str | None) -> None:
    """Check that the packages for logging are installed.

    Raises:
        ConfigError: a package is missing.
    """
    for wanted, package, key in (
        (tensorboard, "tensorboard", "logging.tensorboard"),
        (wandb_project is not None, "wandb", "logging.wandb_project"),
    ):
        if wanted and util.find_spec(package) is None:
            raise ConfigError(f"{key} needs the package {package} (it is not installed); run: pip install {package}")


@contextmanager
def open_log(
    folder: Path, keep_until_images: int, tensorboard: bool, wandb_project: str | None, settings: Mapping[str, Any]
) -> Generator[Log]:
    """Open ``log.jsonl`` and, if requested, TensorBoard's event files and a Weights & Biases run.

    Args:
        folder: the run folder.
        keep_until_images: records with a larger value of ``images`` are removed, because the run writes them again.
        tensorboard: whether to write ``tensorboard/``.
        wandb_project: Weights & Biases project, or None.
        settings: the configuration that Weights & Biases shows.
    """
    with ExitStack() as stack:
        sinks: list[Log] = [stack.enter_context(JsonLog(folder / "log.jsonl", keep_until_images)).write]
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
                config=dict(settings),
            )
            stack.callback(run.finish)
            sinks.append(lambda record: run.log(dict(record), step=record["images"]))

        def write(record: Mapping[str, Any]) -> None:
            for sink in sinks:
                sink(record)

        yield write


def _wandb_id(folder: Path) -> str:
    """The id of this folder's Weights & Biases run: a random id, stored in ``wandb-id.json``.

    The file also stores the folder's path and inode. A folder that was moved, restored or mounted elsewhere still has
    the stored path or inode, and continues its run. A copy of a folder has neither, and gets a new id so that two
    folders do not write to the same run.

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
                f"{kept} must name a run of Weights & Biases (got {type(error).__name__} when reading it); delete the "
                f"file to start a new run there"
            ) from error
        if is_copy:
            print(
                f"{folder} is a copy of {before['path']}, so it gets a new run of Weights & Biases",
                file=sys.stderr,
                flush=True,
            )
            identity = uuid.uuid4().hex
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


def _whole_lines(path: Path, until_images: float) -> list[str]:
    kept: list[str] = []
    for line in path.read_text(encoding="utf-8").split("\n") if path.exists() else ():
        with suppress(json.JSONDecodeError):
            record = json.loads(line)
            if isinstance(record, dict) and record.get("images", 0) <= until_images:
                kept.append(line)
    return kept
