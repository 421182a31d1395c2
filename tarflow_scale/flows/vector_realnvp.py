"""RealNVP for vectors: affine couplings that alternate between even and odd dimensions.

Dinh et al., "Density estimation using Real NVP", arXiv 1605.08803, section 3.4, with a mask of every second dimension.
A coupling keeps one half of the dimensions (a) and changes the other half (b),

    b' = b exp(s) + t,        s, t = network(a),        log|det| = sum s

Before the first coupling each dimension is shifted and scaled. The shifts and scales are initialised from the data,
because dimensions may have different units. Without data, as for a variational posterior, they start at 0 and 1.
Log-scales are bounded as in `tarflow_scale.flows.realnvp`. Networks start at zero, so new couplings are the identity.

Shapes: B batch, D dimensions. log_det: nats, summed over dimensions.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tarflow_scale.config.model import RealNVPConfig
from tarflow_scale.config.sampling import Guidance
from tarflow_scale.flows.conditions import Condition, embed
from tarflow_scale.flows.flow import Flow
from tarflow_scale.flows.logits import to_logits
from tarflow_scale.flows.nice import halves_of, whole_of
from tarflow_scale.runtime.distributed import all_reduce_sum

__all__ = ["COUPLINGS", "ResidualLayers", "VectorRealNVP"]

COUPLINGS = 4
"""Number of couplings on each level."""
_LEAST_DEVIATION = 1e-6
"""A dimension is constant, up to rounding, if its deviation is at most this share of its root mean square."""


class ResidualLayers(nn.Module):
    """A linear layer, residual blocks of two linear layers each, and a linear layer that starts at zero.

    Args:
        inputs, outputs: numbers of dimensions.
        width: width of each hidden layer.
        blocks: number of residual blocks.
        num_classes: number of rows of the label embedding table, or None.
    """

    def __init__(self, inputs: int, outputs: int, width: int, blocks: int, num_classes: int | None) -> None:
        super().__init__()
        self.enter = nn.Linear(inputs, width)
        self.blocks = nn.ModuleList(nn.ModuleList(nn.Linear(width, width) for _ in range(2)) for _ in range(blocks))
        self.out = nn.Linear(width, outputs)
        self.class_embedding = None if num_classes is None else nn.Parameter(torch.zeros(num_classes, width))
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, h: Float[Tensor, "B I"], y: Condition) -> Float[Tensor, "B O"]:
        """The unbounded log-scales and the shifts of an affine map."""
        h = self.enter(h)
        if self.class_embedding is not None:
            h = h + embed(self.class_embedding, y)
        for block in self.blocks:
            first, second = block  # pyright: ignore[reportGeneralTypeIssues]
            h = h + second(F.relu(first(F.relu(h))))
        return self.out(F.relu(h))


class VectorRealNVP(Flow):
    """Affine couplings on vectors.

    Args:
        event_shape: ``(D,)``, with D at least 2.
        num_classes: number of classes; None for an unconditional model.
        config: the section ``model``; each level has four couplings, and ``normalization`` must be ``actnorm``.

    Raises:
        ValueError: the event has one dimension, or the normalization is not ``actnorm``.
    """

    capabilities = replace(RealNVPConfig.CAPABILITIES, guidance=False)

    def __init__(self, event_shape: tuple[int, ...], num_classes: int | None, config: RealNVPConfig) -> None:
        super().__init__(event_shape, num_classes, config.logit_alpha)
        if self.num_dims < 2:
            raise ValueError(f"RealNVP needs at least 2 dimensions (got {self.num_dims}); use another model")
        if config.normalization != "actnorm":
            raise ValueError(
                f"model.normalization must be actnorm for vectors (got {config.normalization}); use actnorm"
            )
        self.log_scale_bound = config.log_scale_bound
        sizes = (self.num_dims - self.num_dims // 2, self.num_dims // 2)
        network = (config.width, config.residual_blocks, num_classes)
        self.networks = nn.ModuleList(
            ResidualLayers(sizes[number % 2], 2 * sizes[1 - number % 2], *network)
            for number in range(COUPLINGS * config.levels)
        )
        self.bias = nn.Parameter(torch.zeros(self.num_dims))
        self.log_scale = nn.Parameter(torch.zeros(self.num_dims))

    @torch.no_grad()
    def initialize(self, x: Tensor, y: Condition = None) -> None:
        """Initialise the shift and scale of each dimension from its mean and deviation in the batch of all ranks."""
        del y
        h = (x if self.logit_alpha is None else to_logits(x, self.logit_alpha)[0]).flatten(1).double()
        sums = all_reduce_sum(torch.cat([h.new_tensor([len(h)]), h.sum(dim=0), h.square().sum(dim=0)]))
        mean, square = (sums[1:] / sums[0]).chunk(2)
        std = (square - mean.square()).clamp(min=0).sqrt()
        varies = std > _LEAST_DEVIATION * square.sqrt()  # a dimension that is constant in this batch keeps scale 1
        self.bias.copy_(-mean)
        self.log_scale.copy_(-torch.log(torch.where(varies, std, torch.ones_like(std))))

    def encode(self, h: Tensor, y: Condition) -> tuple[Float[Tensor, "B D"], Float[Tensor, " B"]]:
        """Map data to noise: ``z (B, D)`` and ``log_det (B,)`` in nats."""
        z, log_dets = self.encode_values(h, y)
        return z.flatten(1), log_dets.flatten(1).sum(dim=1)

    def encode_values(self, h: Tensor, y: Condition) -> tuple[Tensor, Tensor]:
        """See `Flow.encode_values`; the scale and shift of a dimension depend on other dimensions."""
        with torch.autocast(h.device.type, enabled=False):
            halves = halves_of((h.flatten(1) + self.bias) * self.log_scale.exp())
            log_dets = halves_of(self.log_scale.expand(len(h), -1))
        for number in range(len(self.networks)):
            changed = 1 - number % 2
            scale, shift = self._affine(number, halves[number % 2], y)
            halves[changed] = halves[changed] * scale.exp() + shift
            log_dets[changed] = log_dets[changed] + scale
        return whole_of(halves).view(h.shape), whole_of(log_dets).view(h.shape)

    def decode(self, z: Float[Tensor, "B D"], y: Condition, guidance: Guidance | None) -> Tensor:
        """Map noise to data, without guidance."""
        halves = halves_of(z)
        for number in reversed(range(len(self.networks))):
            changed = 1 - number % 2
            scale, shift = self._affine(number, halves[number % 2], y)
            halves[changed] = (halves[changed] - shift) * (-scale).exp()
        return (whole_of(halves) * (-self.log_scale).exp() - self.bias).unflatten(1, self.event_shape)

    def _affine(self, number: int, half: Tensor, y: Condition) -> tuple[Tensor, Tensor]:
        scale, shift = self.recomputed(self.networks[number], half, y).to(half.dtype).chunk(2, dim=1)
        return self.log_scale_bound * torch.tanh(scale / self.log_scale_bound), shift
