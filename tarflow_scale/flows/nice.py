"""NICE: additive couplings on even and odd dimensions in turn, and one scale per dimension at the end.

Dinh et al., "NICE: Non-linear Independent Components Estimation", arXiv 1410.8516. An event is flattened. Coupling k
keeps one half of the dimensions and shifts the other half by a network of the first (their section 3.2); only the last
layer changes volume (section 3.3),

    z = exp(s) h,        log|det| = sum s

Differences from the published model: the base is a standard normal, as in all flows here, not logistic; networks start
at zero, so a fresh flow is the identity; a label is added to the first hidden layer, through a table that starts at
zero.

Shapes: B batch, D dimensions, K classes. log_det: nats, summed over dimensions.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from tarflow_scale.config.model import NICEConfig
from tarflow_scale.config.sampling import Guidance
from tarflow_scale.flows.conditions import Condition, embed
from tarflow_scale.flows.flow import Flow
from tarflow_scale.flows.recompute import checkpoint

__all__ = ["NICE", "ShiftNetwork", "halves_of", "whole_of"]


class ShiftNetwork(nn.Module):
    """Layers of ReLU, the last one linear and zero at the start.

    Args:
        inputs, outputs: numbers.
        width: of a hidden layer.
        hidden_layers: how many.
        num_classes: classes, or None.
    """

    def __init__(self, inputs: int, outputs: int, width: int, hidden_layers: int, num_classes: int | None) -> None:
        super().__init__()
        widths = [inputs, *[width] * hidden_layers]
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.out = nn.Linear(width, outputs)
        self.class_embedding = None if num_classes is None else nn.Parameter(torch.zeros(num_classes, width))
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, h: Float[Tensor, "B I"], y: Condition) -> Float[Tensor, "B O"]:
        """The shift of the other half."""
        for number, layer in enumerate(self.hidden):
            h = layer(h)
            if number == 0 and self.class_embedding is not None:
                h = h + embed(self.class_embedding, y)
            h = F.relu(h)
        return self.out(h)


class NICE(Flow):
    """Additive couplings and a diagonal scale.

    Args:
        event_shape: of images or vectors; at least two dimensions.
        num_classes: classes, or None for an unconditional model.
        couplings: how many; 4 as published.
        width: of a hidden layer; 1,000 as published for MNIST.
        hidden_layers: of each network; 5 as published for MNIST.
        logit_alpha: see `Flow`.

    Raises:
        ValueError: an event of one dimension.
    """

    capabilities = NICEConfig.CAPABILITIES

    def __init__(
        self,
        event_shape: tuple[int, ...],
        num_classes: int | None,
        *,
        couplings: int = 4,
        width: int = 1000,
        hidden_layers: int = 5,
        logit_alpha: float | None = None,
    ) -> None:
        super().__init__(event_shape, num_classes, logit_alpha)
        if self.num_dims < 2:
            raise ValueError(f"NICE needs at least 2 dimensions (got {self.num_dims}); use another model")
        sizes = (self.num_dims - self.num_dims // 2, self.num_dims // 2)
        self.networks = nn.ModuleList(
            ShiftNetwork(sizes[number % 2], sizes[1 - number % 2], width, hidden_layers, num_classes)
            for number in range(couplings)
        )
        self.log_scale = nn.Parameter(torch.zeros(self.num_dims))

    def encode(self, h: Tensor, y: Condition) -> tuple[Float[Tensor, "B D"], Float[Tensor, " B"]]:
        """Data to noise: ``z (B, D)`` and ``log_det (B,)`` in nats."""
        halves = halves_of(h.flatten(1))
        for number in range(len(self.networks)):
            halves[1 - number % 2] = halves[1 - number % 2] + self._shift(number, halves[number % 2], y)
        z = whole_of(halves) * self.log_scale.exp()
        return z, self.log_scale.sum().expand(len(z))

    def encode_values(self, h: Tensor, y: Condition) -> tuple[Tensor, Tensor]:
        """As `Flow.encode_values`."""
        z, _ = self.encode(h, y)
        return z.view(h.shape), self.log_scale.view(h.shape[1:]).expand_as(h)

    def decode(self, z: Float[Tensor, "B D"], y: Condition, guidance: Guidance | None) -> Tensor:
        """Noise to data; there is no guidance."""
        halves = halves_of(z * (-self.log_scale).exp())
        for number in reversed(range(len(self.networks))):
            halves[1 - number % 2] = halves[1 - number % 2] - self._shift(number, halves[number % 2], y)
        return whole_of(halves).unflatten(1, self.event_shape)

    def _shift(self, number: int, half: Tensor, y: Condition) -> Tensor:
        network = self.networks[number]
        recompute = torch.is_grad_enabled() and self.activations == "checkpoint"
        shift = checkpoint(network, half, y) if recompute else network(half, y)
        return shift.to(half.dtype)


def halves_of(h: Float[Tensor, "B D"]) -> list[Tensor]:
    """Even and odd dimensions; where D is odd there is one more even dimension."""
    return [h[:, 0::2], h[:, 1::2]]


def whole_of(halves: list[Tensor]) -> Float[Tensor, "B D"]:
    """Inverse of `halves_of`."""
    even, odd = halves
    if even.shape[1] == odd.shape[1]:
        return rearrange([even, odd], "half b d -> b (d half)")
    whole = rearrange([even[:, :-1], odd], "half b d -> b (d half)")
    return torch.cat([whole, even[:, -1:]], dim=1)
