"""Sample index to latent: a function of (seed, index) alone."""

import numpy as np
import torch
from torch import Tensor

from tarflow_scale.randomness import Purpose, generator

__all__ = ["balanced_labels", "latents"]


def latents(seed: int, indices: range, num_dims: int) -> Tensor:
    """Standard normal ``z (len(indices), D)`` fp32, drawn on the CPU; row i depends on (seed, indices[i]) only."""
    z = np.empty((len(indices), num_dims), dtype=np.float32)
    for row, index in enumerate(indices):
        z[row] = generator(Purpose.LATENT, seed, index).standard_normal(num_dims, np.float32)
    return torch.from_numpy(z)


def balanced_labels(indices: range, num_classes: int) -> Tensor:
    """Label ``index mod num_classes`` for every index, ``(len(indices),)`` int64."""
    return torch.tensor([index % num_classes for index in indices], dtype=torch.int64)
