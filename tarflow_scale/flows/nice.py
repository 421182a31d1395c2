"""NICE: additive couplings that alternate between even and odd dimensions, and a final scale of each dimension.

Dinh et al., "NICE: Non-linear Independent Components Estimation", arXiv 1410.8516. An event is flattened. Each
coupling keeps one half of the dimensions; a network computes the shift of the other half from it (section 3.2). Only
the last layer changes volume (section 3.3):

    z = exp(s) h,        log|det| = sum s

Differences from the published model: the base is a standard normal, as in all flows here, not logistic; networks start
at zero, so a new flow is the identity; the embedding of a label, zero at the start, is added to the first hidden layer.

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

__all__ = ["NICE", "ShiftNetwork", "halves_of", "whole_of"]


class ShiftNetwork(nn.Module):
    """A network of hidden ReLU layers and a linear output layer that starts at zero.

    Args:
        inputs, outputs: numbers of input and output dimensions.
        width: width of each hidden layer.
        hidden_layers: number of hidden layers.
        num_classes: number of classes, or None.
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
        """The shift of the other half of the dimensions."""
        for number, layer in enumerate(self.hidden):
            h = layer(h)
            if number == 0 and self.class_embedding is not None:
                h = h + embed(self.class_embedding, y)
            h = F.relu(h)
        return self.out(h)


class NICE(Flow):
    """Additive couplings and a diagonal scale.

    Args:
        event_shape: shape of an image or vector of at least two dimensions.
        num_classes: number of classes; None for an unconditional model.
        config: the section ``model``; its defaults are the published settings for MNIST.

    Raises:
        ValueError: the event has one dimension.
    """

    capabilities = NICEConfig.CAPABILITIES

    def __init__(self, event_shape: tuple[int, ...], num_classes: int | None, config: NICEConfig) -> None:
        super().__init__(event_shape, num_classes, config.logit_alpha)
        if self.num_dims < 2:
            raise ValueError(f"NICE needs at least 2 dimensions (got {self.num_dims}); use another model")
        sizes = (self.num_dims - self.num_dims // 2, self.num_dims // 2)
        self.networks = nn.ModuleList(
            ShiftNetwork(sizes[number % 2], sizes[1 - number % 2], config.width, config.hidden_layers, num_classes)
            for number in range(config.couplings)
        )
        self.log_scale = nn.Parameter(torch.zeros(self.num_dims))

    def encode(self, h: Tensor, y: Condition) -> tuple[Float[Tensor, "B D"], Float[Tensor, " B"]]:
        """Map data to noise: ``z (B, D)`` and ``log_det (B,)`` in nats."""
        halves = halves_of(h.flatten(1))
        for number in range(len(self.networks)):
            halves[1 - number % 2] = halves[1 - number % 2] + self._shift(number, halves[number % 2], y)
        z = whole_of(halves) * self.log_scale.exp()
        return z, self.log_scale.sum().expand(len(z))

    def encode_values(self, h: Tensor, y: Condition) -> tuple[Tensor, Tensor]:
        """See `Flow.encode_values`."""
        z, _ = self.encode(h, y)
        return z.view(h.shape), self.log_scale.view(h.shape[1:]).expand_as(h)

    def decode(self, z: Float[Tensor, "B D"], y: Condition, guidance: Guidance | None) -> Tensor:
        """Map noise to data, without guidance."""
        halves = halves_of(z * (-self.log_scale).exp())
        for number in reversed(range(len(self.networks))):
            halves[1 - number % 2] = halves[1 - number % 2] - self._shift(number, halves[number % 2], y)
        return whole_of(halves).unflatten(1, self.event_shape)

    def _shift(self, number: int, half: Tensor, y: Condition) -> Tensor:
        return self.recomputed(self.networks[number], half, y).to(half.dtype)


def halves_of(h: Float[Tensor, "B D"]) -> list[Tensor]:
    """The even and the odd dimensions, counted from 0; if D is odd, there is one more even dimension."""
    return [h[:, 0::2], h[:, 1::2]]


def whole_of(halves: list[Tensor]) -> Float[Tensor, "B D"]:
    """Inverse of `halves_of`."""
    even, odd = halves
    if even.shape[1] == odd.shape[1]:
        return rearrange([even, odd], "half b d -> b (d half)")
    whole = rearrange([even[:, :-1], odd], "half b d -> b (d half)")
    return torch.cat([whole, even[:, -1:]], dim=1)
