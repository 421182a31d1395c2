"""Sample index to latent: a function of (seed, index) alone."""

import numpy as np
import torch
from torch import Tensor

from tarflow_scale.randomness import Purpose, generator

__all__ = ["latents"]


def latents(seed: int, indices: range, num_dims: int) -> Tensor:
    """Standard normal ``z (len(indices), D)`` fp32, drawn on the CPU; row i depends on (seed, indices[i]) only."""
    z = np.empty((len(indices), num_dims), dtype=np.float32)
    for row, index in enumerate(indices):
        z[row] = generator(Purpose.LATENT, seed, index).standard_normal(num_dims, np.float32)
    return torch.from_numpy(z)
