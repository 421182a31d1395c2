"""Record corrupt samples in a list, and stop the run if there are too many of them."""

import json
from pathlib import Path

from tarflow_scale.errors import DataError
from tarflow_scale.shards.reader import CorruptSample

__all__ = ["Quarantine", "check_share"]

_ALLOWANCE_SAMPLES = 10_000
"""The corrupt share is computed as if at least this many samples were read, so one early fault does not stop a run."""


def check_share(num_replaced: int, num_read: int, max_fraction: float, path: str) -> None:
    """Stop a run if its ranks and workers together have read too many corrupt samples.

    Args:
        num_replaced: number of corrupt samples so far.
        num_read: number of samples so far.
        max_fraction: largest allowed share, ``data.max_corrupt_fraction``.
        path: folder with the lists of corrupt samples, for the message.

    Raises:
        DataError: the share of corrupt samples is too large.
    """
    if num_replaced > max_fraction * max(num_read, _ALLOWANCE_SAMPLES):
        raise DataError(
            f"too many corrupt samples (got {num_replaced} among {num_read} read, allowed: "
            f"data.max_corrupt_fraction={max_fraction:g}); they are listed in {path}/quarantine-*.jsonl"
        )


class Quarantine:
    """The list of corrupt samples of one rank.

    Args:
        path: local file with a line of JSON, ``{"shard", "sample", "key", "reason"}``, for each corrupt sample; more
            than one process may append to it. If None, no list is kept.
    """

    def __init__(self, path: str | None) -> None:
        self._path = path
        self._known: set[tuple[str, int]] | None = None

    def add(self, fault: CorruptSample) -> None:
        """Append a corrupt sample to the list, unless it is in the list already."""
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
        with Path(self._path).open("ab", buffering=0) as file:  # one write, so that lines of two processes do not mix
            file.write(json.dumps(record).encode() + b"\n")


def _read_known(path: str) -> set[tuple[str, int]]:
    known: set[tuple[str, int]] = set()
    if Path(path).exists():
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
                known.add((record["shard"], record["sample"]))
            except (ValueError, KeyError, TypeError):
                continue  # a killed process left part of a line; the sample will be appended again
    return known
