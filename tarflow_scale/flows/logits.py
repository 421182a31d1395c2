"""The logit transform in front of a flow, and its log-determinant."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

__all__ = ["from_logits", "logit_log_dets", "to_logits"]


def to_logits(x: Float[Tensor, "B ..."], alpha: float) -> tuple[Float[Tensor, "B ..."], Float[Tensor, " B"]]:
    """``logit(alpha + (1 - 2 alpha) (x + 1) / 2)`` and its log-determinant (Dinh et al., arXiv 1605.08803, sec. 4.1).

    It spreads out values near -1 and 1, where nearly all pixels of MNIST and similar images lie. Values beyond
    +-1 / (1 - 2 alpha), which Gaussian noise can produce, give NaN.
    """
    p = alpha + (1 - 2 * alpha) * (x + 1) / 2
    h = torch.log(p) - torch.log1p(-p)
    return h, logit_log_dets(h, alpha).flatten(1).sum(dim=1)


def logit_log_dets(h: Tensor, alpha: float) -> Tensor:
    """Log-derivative of `to_logits` at every value, computed from the output ``h``."""
    return math.log((1 - 2 * alpha) / 2) + F.softplus(h) + F.softplus(-h)


def from_logits(h: Float[Tensor, "B ..."], alpha: float) -> Float[Tensor, "B ..."]:
    """Inverse of `to_logits`."""
    return 2 * (torch.sigmoid(h) - alpha) / (1 - 2 * alpha) - 1
