"""Which label a sample index gets."""

import torch
from torch import Tensor

__all__ = ["balanced_labels"]


def balanced_labels(indices: range, num_classes: int) -> Tensor:
    """Label ``index mod num_classes`` for every index, ``(len(indices),)`` int64."""
    return torch.tensor([index % num_classes for index in indices], dtype=torch.int64)
