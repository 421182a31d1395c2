"""Corrupt samples are written down, counted, and stop the run when there are too many."""

import json
import os
from pathlib import Path

from tarflow_scale.errors import DataError
from tarflow_scale.shards.reader import CorruptSample

__all__ = ["Quarantine"]

_ALLOWANCE_SAMPLES = 10_000
"""A run of fewer samples is judged as if it had read so many, so that one early fault does not stop it."""


class Quarantine:
    """Corrupt samples of one process.

    Args:
        path: local JSONL file, one line ``{"shard", "sample", "key", "reason"}`` for each corrupt sample; several
            processes may append to it. None writes nothing.
        max_fraction: corrupt samples, of those read, beyond which the run stops.
    """

    def __init__(self, path: str | None, max_fraction: float) -> None:
        self._path = path
        self._max_fraction = max_fraction
        self._known: set[tuple[str, int]] | None = None
        self.num_read = 0
        self.num_corrupt = 0

    def passed(self, num_samples: int) -> None:
        """Count samples that were read."""
        self.num_read += num_samples

    def add(self, fault: CorruptSample) -> None:
        """Count and write down a corrupt sample.

        Raises:
            DataError: there are too many.
        """
        self.num_corrupt += 1
        self._write(fault)
        if self.num_corrupt > self._max_fraction * max(self.num_read, _ALLOWANCE_SAMPLES):
            where = f"; they are listed in {self._path}" if self._path else ""
            raise DataError(
                f"too many corrupt samples (got {self.num_corrupt} among {self.num_read} read, allowed: "
                f"data.max_corrupt_fraction={self._max_fraction:g}), the last: {fault.sample.origin} "
                f"{fault.reason}{where}"
            )

    def _write(self, fault: CorruptSample) -> None:
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
                continue  # a line that a kill cut short is written again
    return known
