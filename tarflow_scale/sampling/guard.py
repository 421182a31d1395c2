"""Replace bad generated images by new attempts. The rule is part of the generation plan.

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
    """Counts of images, of their values and of bad attempts, for one shard or for all shards."""

    images: int = 0
    """Number of accepted images."""
    not_finite: int = 0
    """Number of attempts with a value that is not finite."""
    saturated: int = 0
    """Number of attempts with too many values outside [-1, 1]."""
    redrawn: int = 0
    """Number of accepted images that are not from the first attempt."""
    values: int = 0
    """Number of values of the accepted images."""
    outside: int = 0
    """Number of values of the accepted images that lie outside [-1, 1] by more than the width of a pixel level."""

    def plus(self, other: "Quality") -> "Quality":
        """Add each count of ``other`` to the same count of this object."""
        return Quality(**{name: getattr(self, name) + getattr(other, name) for name in Quality.model_fields})


@dataclass(frozen=True)
class Drawn:
    """A batch of accepted images ``x (b, C, H, W)``, the attempt that produced each, and counts of bad attempts."""

    indices: range
    x: Tensor
    attempts: tuple[int, ...]
    quality: Quality


def guarded(sampler: Sampler, indices: range, guard: GuardConfig, level: float) -> Iterator[Drawn]:
    """Draw batches of images, and replace bad images by new attempts.

    Args:
        sampler: draws the images.
        indices: indices of the images.
        guard: the section ``guard``, which defines bad images.
        level: width of a pixel level on the scale [-1, 1].

    Raises:
        NumericsError: all attempts at an image were bad.
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
                    f"image {part[bad[0]]} was {fault} after {attempt + 1} attempts; check the model, or lower "
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
    """Whether all values of each image are finite, and how many exceed [-1, 1] by more than ``level``; CPU tensors."""
    flat = x.flatten(1)
    return torch.isfinite(flat).all(dim=1).cpu(), (flat.abs() > 1 + level).sum(dim=1).cpu()
