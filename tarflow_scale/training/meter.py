"""Speed of a run between two log lines: images and tokens per second, utilisation, time by activity.

Model FLOPs utilisation (MFU) is

    images per second per rank * training FLOPs per image / peak FLOP/s of the rank's device

Training FLOPs per image are computed by `tarflow_scale.capacity.flops`; they do not include recomputation (Chowdhery et
al., arXiv 2204.02311).
"""

import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch

from tarflow_scale.capacity.gpus import card_of_device

__all__ = ["Meter", "peak_flops_of"]

Part = Literal["data", "checkpoint", "validation", "preview"]


def peak_flops_of(device: torch.device) -> float | None:
    """Peak operations per second (FLOP/s) of a device in bf16; None for an unknown device."""
    if device.type != "cuda":
        return None
    card = card_of_device(torch.cuda.get_device_name(device))
    return None if card is None else card.bf16_flops


@dataclass
class Meter:
    """Measures the time since the last report.

    Args:
        flops_per_image: operations per image in a training step.
        tokens_per_image: number of tokens per image; None for models without tokens.
        peak_flops: peak operations per second of a rank's device; if None, no utilisation is reported.
        ranks: number of ranks.
    """

    flops_per_image: float
    tokens_per_image: int | None
    peak_flops: float | None
    ranks: int
    _started: float = field(default_factory=time.perf_counter)
    _images: int = 0
    _spent: dict[Part, float] = field(default_factory=dict)

    @contextmanager
    def spending(self, part: Part) -> Generator[None]:
        """Add the duration of the ``with`` block to the time of ``part``."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._spent[part] = self._spent.get(part, 0.0) + time.perf_counter() - started

    def stepped(self, images: int) -> None:
        """Count the images of a step."""
        self._images += images

    def figures(self) -> dict[str, float | None]:
        """Measurements since the last report, by name."""
        return self._figures(time.perf_counter())

    def report(self) -> dict[str, float | None]:
        """Measurements since the last report, by name; a new interval starts now."""
        now = time.perf_counter()
        figures = self._figures(now)
        self._started, self._images, self._spent = now, 0, {}
        return figures

    def _figures(self, now: float) -> dict[str, float | None]:
        aside = {part: seconds for part, seconds in self._spent.items() if part != "data"}
        seconds = max(now - self._started - sum(aside.values()), 1e-9)
        rate = self._images / seconds
        utilisation = rate / self.ranks * self.flops_per_image / self.peak_flops if self.peak_flops else None
        return {
            "images_per_second": rate,
            "tokens_per_second": rate * self.tokens_per_image if self.tokens_per_image else None,
            "mfu": utilisation,
            "data_wait_fraction": self._spent.get("data", 0.0) / seconds,
        } | {f"{part}_seconds": aside.get(part, 0.0) for part in ("checkpoint", "validation", "preview")}
