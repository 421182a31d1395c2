"""Corrupt samples are listed, counted, and stop the run if there are too many."""

import json
import os
from pathlib import Path

from tarflow_scale.errors import DataError
from tarflow_scale.shards.reader import CorruptSample

__all__ = ["Quarantine", "check_share"]

_ALLOWANCE_SAMPLES = 10_000
"""The share is computed as if the run had read at least so many samples, so that one early fault does not stop it."""


def check_share(num_replaced: int, num_read: int, max_fraction: float, path: str) -> None:
    """Refuse to continue if all ranks and workers of a run together met too many corrupt samples.

    Args:
        num_replaced: corrupt samples so far.
        num_read: samples so far.
        max_fraction: the allowed share, ``data.max_corrupt_fraction``.
        path: folder of the lists, for the message.

    Raises:
        DataError: there are too many.
    """
    if num_replaced > max_fraction * max(num_read, _ALLOWANCE_SAMPLES):
        raise DataError(
            f"too many corrupt samples (got {num_replaced} among {num_read} read, allowed: "
            f"data.max_corrupt_fraction={max_fraction:g}); they are listed in {path}/quarantine-*.jsonl"
        )


class Quarantine:
    """The list of corrupt samples of one rank.

    Args:
        path: local JSONL file with a line ``{"shard", "sample", "key", "reason"}`` for each corrupt sample; several
            processes may append to it. None writes nothing.
    """

    def __init__(self, path: str | None) -> None:
        self._path = path
        self._known: set[tuple[str, int]] | None = None

    def add(self, fault: CorruptSample) -> None:
        """Append a corrupt sample, unless it is listed already."""
        if self._path is None:
            return
        if self._known is None:
            self._known = _read_known(self._path)
        sample = fault.sample
        shard = f"{sample.path}/{sample.file}"
        if (shard, sample.place) in self._known:
            return
        self._known.add((shard, sample.place))
        record = {"shard": shard, "sample": sample.place, "key": sample.key, "reason": fault.reason}
        Path(self._path).parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, json.dumps(record).encode() + b"\n")  # one write, so that lines of processes do not mix
        finally:
            os.close(handle)


def _read_known(path: str) -> set[tuple[str, int]]:
    known: set[tuple[str, int]] = set()
    if Path(path).exists():
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
                known.add((record["shard"], record["sample"]))
            except (ValueError, KeyError, TypeError):
                continue  # a line that was cut short by a kill is appended again
    return known
