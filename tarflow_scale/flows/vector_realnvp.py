"""RealNVP for vectors: affine couplings on even and odd dimensions in turn.

Dinh et al., "Density estimation using Real NVP", arXiv 1605.08803, section 3.4, with a mask of every second dimension.
A coupling keeps one half a and changes the other,

    b' = b exp(s) + t,        s, t = network(a),        log|det| = sum s

Before the first coupling each dimension has its own shift and scale. They are initialised from the data, whose columns
have different units, and are the identity where there are no data, as for a variational posterior. Log-scales are
bounded as in `tarflow_scale.flows.realnvp`; networks start at zero, so that a fresh flow is the identity.

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
from tarflow_scale.flows.recompute import checkpoint
from tarflow_scale.runtime.distributed import all_reduce_sum

__all__ = ["COUPLINGS", "ResidualLayers", "VectorRealNVP"]

COUPLINGS = 4
"""Couplings of a level."""
_LEAST_DEVIATION = 1e-6
"""Smallest deviation of a dimension that is not rounding, as a share of its root mean square."""


class ResidualLayers(nn.Module):
    """A linear layer, residual blocks of two, and one that starts at zero.

    Args:
        inputs, outputs: numbers.
        width: of a hidden layer.
        blocks: how many.
        num_classes: rows of the table that conditions pass, or None.
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
        """Raw parameters of an affine map."""
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
        event_shape: ``(D,)``, at least two dimensions.
        num_classes: classes, or None for an unconditional model.
        levels: number of levels; each level has four couplings.
        width: width of a hidden layer.
        residual_blocks: number of residual blocks in each network.
        normalization: must be ``actnorm``.
        log_scale_bound: bound c of the log-scales.
        logit_alpha: see `Flow`.

    Raises:
        ValueError: the event has one dimension, or the normalization is not ``actnorm``.
    """

    capabilities = replace(RealNVPConfig.CAPABILITIES, guidance=False)

    def __init__(
        self,
        event_shape: tuple[int, ...],
        num_classes: int | None,
        *,
        levels: int,
        width: int = 64,
        residual_blocks: int = 4,
        normalization: str = "actnorm",
        log_scale_bound: float = 2.0,
        logit_alpha: float | None = None,
    ) -> None:
        super().__init__(event_shape, num_classes, logit_alpha)
        if self.num_dims < 2:
            raise ValueError(f"RealNVP needs at least 2 dimensions (got {self.num_dims}); use another model")
        if normalization != "actnorm":
            raise ValueError(f"model.normalization of vectors must be actnorm (got {normalization}); set it")
        self.log_scale_bound = log_scale_bound
        sizes = (self.num_dims - self.num_dims // 2, self.num_dims // 2)
        self.networks = nn.ModuleList(
            ResidualLayers(sizes[number % 2], 2 * sizes[1 - number % 2], width, residual_blocks, num_classes)
            for number in range(COUPLINGS * levels)
        )
        self.bias = nn.Parameter(torch.zeros(self.num_dims))
        self.log_scale = nn.Parameter(torch.zeros(self.num_dims))

    @torch.no_grad()
    def initialize(self, x: Tensor, y: Condition = None) -> None:
        """Initialise each dimension's shift and scale from mean and deviation of the batch over all ranks."""
        del y
        h = (x if self.logit_alpha is None else to_logits(x, self.logit_alpha)[0]).flatten(1).double()
        sums = all_reduce_sum(torch.cat([h.new_tensor([len(h)]), h.sum(dim=0), h.square().sum(dim=0)]))
        mean, square = (sums[1:] / sums[0]).chunk(2)
        std = (square - mean.square()).clamp(min=0).sqrt()
        told = std > _LEAST_DEVIATION * square.sqrt()  # a dimension that is constant in this batch has no scale
        self.bias.copy_(-mean)
        self.log_scale.copy_(-torch.log(torch.where(told, std, torch.ones_like(std))))

    def encode(self, h: Tensor, y: Condition) -> tuple[Float[Tensor, "B D"], Float[Tensor, " B"]]:
        """Data to noise: ``z (B, D)`` and ``log_det (B,)`` in nats."""
        z, log_dets = self.encode_values(h, y)
        return z.flatten(1), log_dets.flatten(1).sum(dim=1)

    def encode_values(self, h: Tensor, y: Condition) -> tuple[Tensor, Tensor]:
        """As `Flow.encode_values`: every map changes one dimension, given others."""
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
        """Noise to data; there is no guidance."""
        halves = halves_of(z)
        for number in reversed(range(len(self.networks))):
            changed = 1 - number % 2
            scale, shift = self._affine(number, halves[number % 2], y)
            halves[changed] = (halves[changed] - shift) * (-scale).exp()
        return (whole_of(halves) * (-self.log_scale).exp() - self.bias).unflatten(1, self.event_shape)

    def _affine(self, number: int, half: Tensor, y: Condition) -> tuple[Tensor, Tensor]:
        network = self.networks[number]
        recompute = torch.is_grad_enabled() and self.activations == "checkpoint"
        raw = (checkpoint(network, half, y) if recompute else network(half, y)).to(half.dtype)
        scale, shift = raw.chunk(2, dim=1)
        return self.log_scale_bound * torch.tanh(scale / self.log_scale_bound), shift
