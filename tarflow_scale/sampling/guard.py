"""Which generated images are kept: bad ones are drawn again by a rule that is part of the plan.

Attempt a at image i decodes latent a of index i, so every worker gets the same image.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tarflow_scale.config.sampling import GuardConfig
from tarflow_scale.errors import NumericsError
from tarflow_scale.records import Record
from tarflow_scale.sampling.sampler import Sampler

__all__ = ["Drawn", "Quality", "guarded"]


class Quality(Record):
    """What was wrong with the images of a shard, or of all."""

    images: int = 0
    not_finite: int = 0
    """Attempts with a value that is not finite."""
    saturated: int = 0
    """Attempts with too many values outside [-1, 1]."""
    redrawn: int = 0
    """Images that are kept from a later attempt than the first."""
    values: int = 0
    """Values of the images that are kept."""
    outside: int = 0
    """Values of the images that are kept which lie outside [-1, 1] by more than a level."""

    def plus(self, other: "Quality") -> "Quality":
        """The sum of both."""
        return Quality(**{name: getattr(self, name) + getattr(other, name) for name in Quality.model_fields})


@dataclass(frozen=True)
class Drawn:
    """A batch of images that are kept, ``x (b, C, H, W)``, with the attempt of each image and what was wrong."""

    indices: range
    x: Tensor
    attempts: tuple[int, ...]
    quality: Quality


def guarded(sampler: Sampler, indices: range, guard: GuardConfig, level: float) -> Iterator[Drawn]:
    """Batches of good images.

    Args:
        sampler: draws the images.
        indices: of the images.
        guard: which images are good.
        level: width of a level on [-1, 1].

    Raises:
        NumericsError: an image was bad at every attempt.
    """
    for low in range(0, len(indices), sampler.batch_size):
        part = indices[low : low + sampler.batch_size]
        x = sampler.draw(part)
        attempts = [0] * len(part)
        not_finite = saturated = 0
        outside = torch.zeros(len(part), dtype=torch.int64)
        for attempt in range(guard.attempts + 1):
            finite, outside = _inspected(x, level)
            most = x[0].numel() if guard.saturated_share is None else guard.saturated_share * x[0].numel()
            full = outside > most
            fresh = torch.tensor([latest == attempt for latest in attempts])
            not_finite += int((~finite & fresh).sum())
            saturated += int((full & finite & fresh).sum())
            bad = torch.nonzero(~finite | full).flatten().tolist()
            if not bad:
                break
            if attempt == guard.attempts:
                fault = "not finite" if not bool(finite[bad[0]]) else "saturated"
                raise NumericsError(
                    f"image {part[bad[0]]} was {fault} at {attempt + 1} attempts; check the model, or lower "
                    f"sampling.guidance.scale and sampling.temperature"
                )
            x = x.clone()
            x[bad] = sampler.draw([part[row] for row in bad], attempt + 1)
            for row in bad:
                attempts[row] = attempt + 1
        quality = Quality(
            images=len(part),
            not_finite=not_finite,
            saturated=saturated,
            redrawn=sum(latest > 0 for latest in attempts),
            values=x.numel(),
            outside=int(outside.sum()),
        )
        yield Drawn(part, x, tuple(attempts), quality)


def _inspected(x: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """For each image, whether all values are finite, and how many exceed [-1, 1] by more than ``level``; on the CPU."""
    flat = x.flatten(1)
    return torch.isfinite(flat).all(dim=1).cpu(), (flat.abs() > 1 + level).sum(dim=1).cpu()
