"""The latents of samples, each a function of seed, sample index and attempt only."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tarflow_scale.randomness import Purpose, generator

__all__ = ["latents"]


def latents(
    seed: int, indices: Sequence[int], num_dims: int, attempt: int = 0, purpose: Purpose = Purpose.LATENT
) -> Tensor:
    """Standard normal ``z (len(indices), D)`` fp32, drawn on the CPU; row i depends on (seed, indices[i], attempt).

    Args:
        seed: seed of the latents.
        indices: indices of the samples.
        num_dims: number of dimensions D.
        attempt: number of the attempt, from 0; a rejected sample is drawn again with the next number.
        purpose: streams of different purposes differ.
    """
    z = np.empty((len(indices), num_dims), dtype=np.float32)
    for row, index in enumerate(indices):
        z[row] = generator(purpose, seed, index, attempt).standard_normal(num_dims, np.float32)
    return torch.from_numpy(z)
