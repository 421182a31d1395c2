"""The standard normal distribution, to which every flow maps data."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["standard_normal_log_prob", "standard_normal_nats"]


def standard_normal_log_prob(z: Float[Tensor, "B D"]) -> Float[Tensor, " B"]:
    """Log density of ``z`` under N(0, I), in nats, summed over D in fp32 or wider."""
    z = z.float() if z.dtype in (torch.bfloat16, torch.float16) else z
    return -standard_normal_nats(z).sum(dim=1)


def standard_normal_nats(z: Tensor) -> Tensor:
    """Negative log of the standard normal density at every value, in nats."""
    return 0.5 * (z.square() + math.log(2 * math.pi))
