"""Invertible layers on feature maps: activation normalisation, 1x1 convolution, coupling, and the squeeze.

These are the layers of Glow (Kingma and Dhariwal, arXiv 1807.03039, section 3 and table 1). Layers compute in the
precision of their input, which is fp32 or wider also under autocast; only the networks inside couplings run in bf16.

Shapes: B batch, C channels, H W pixels. A log-determinant is ``(B,)``, in nats, summed over dimensions.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from tarflow_scale.runtime.distributed import all_reduce_sum

__all__ = [
    "ActNorm",
    "Coupling",
    "CouplingNetwork",
    "InvertibleConv",
    "Layer",
    "Leaves",
    "Normalization",
    "ZeroConv",
    "per_channel",
    "squeeze",
    "statistics",
    "unsqueeze",
]

_STD_FLOOR = 1e-6
_ZERO_CONV_GAIN = 3.0
"""Factor on the log-scale of a `ZeroConv`, as published; it acts like a higher learning rate."""
_SIGMOID_SHIFT = 2.0
"""A zero-initialised affine coupling scales by sigmoid(2) = 0.88, as published."""

Leaves = tuple[Tensor, ...]


def squeeze(x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C4 H2 W2"]:
    """Trade space for channels: every 2x2 square becomes 4 channels, ordered (channel, row, column)."""
    return rearrange(x, "b c (h p) (w q) -> b (c p q) h w", p=2, q=2)


def unsqueeze(x: Float[Tensor, "B C4 H2 W2"]) -> Float[Tensor, "B C H W"]:
    """Inverse of `squeeze`."""
    return rearrange(x, "b (c p q) h w -> b c (h p) (w q)", p=2, q=2)


class Layer(nn.Module, ABC):
    """An invertible layer.

    Call both directions through ``__call__``, because ZeRO-3 gathers the parameters of a module there.
    """

    def forward(self, x: Tensor, inverse: bool = False) -> Any:
        """Map ``x`` to ``(y, log_det)``; with ``inverse``, apply the inverse map to ``x`` instead."""
        return self._invert(x) if inverse else self._map(x)

    def map_places(self, x: Float[Tensor, "B C H W"]) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B H W"]]:
        """Map ``x`` to ``y`` and the log-determinant of each pixel; by default it is shared equally among pixels."""
        y, log_det = self(x)
        return y, (log_det / (x.shape[2] * x.shape[3]))[:, None, None].expand(len(x), *x.shape[2:])

    def inverse(self, y: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """The ``x`` that this layer maps to ``y``."""
        return self(y, inverse=True)

    @abstractmethod
    def _map(self, x: Tensor) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
    def _invert(self, y: Tensor) -> Tensor: ...


def statistics(
    x: Float[Tensor, "B C H W"], all_reduce: Callable[[Tensor], Tensor]
) -> tuple[Float[Tensor, " C"], Float[Tensor, " C"]]:
    """Mean and variance of each channel over all ranks, in fp64; ``all_reduce`` sums over ranks."""
    wide = x.double()
    count = wide.new_full((1,), wide.shape[0] * wide.shape[2] * wide.shape[3])
    sums = torch.cat([wide.sum(dim=(0, 2, 3)), wide.square().sum(dim=(0, 2, 3)), count])
    total, squares, count = all_reduce(sums).split([x.shape[1], x.shape[1], 1])
    mean = total / count
    return mean, (squares / count - mean.square()).clamp(min=0)


class Normalization(Layer):
    """A layer whose parameters are initialised from data."""

    @abstractmethod
    def initialize(self, x: Float[Tensor, "B C H W"]) -> None:
        """Initialise from ``x``, this rank's part of one batch, which may be empty."""


class ActNorm(Normalization):
    """A scale and a shift for each channel: ``y = (x + bias) exp(log_scale)``.

    Initialisation gives the outputs of the first batch mean 0 and deviation 1. Statistics are summed over all ranks, so
    all ranks get identical parameters. Up to rounding, one process with all images would get the same parameters. A
    buffer, saved with the weights, records whether the layer was initialised.

    Args:
        channels: number of channels C.
    """

    initialized: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool))
        self._known_initialized = False

    @torch.no_grad()
    def initialize(self, x: Float[Tensor, "B C H W"]) -> None:
        """Initialise scale and shift from ``x``, this rank's part of one batch, which may be empty."""
        mean, variance = statistics(x, all_reduce_sum)
        self.bias.copy_(-mean)
        self.log_scale.copy_(-torch.log(variance.sqrt() + _STD_FLOOR))
        self.initialized.fill_(True)

    def _map(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self._check_initialized()
        y = (x + per_channel(self.bias, x)) * per_channel(self.log_scale.exp(), x)
        return y, (self.log_scale.sum() * (x.shape[2] * x.shape[3])).expand(len(x))

    def _invert(self, y: Tensor) -> Tensor:
        self._check_initialized()
        return y * per_channel((-self.log_scale).exp(), y) - per_channel(self.bias, y)

    def _check_initialized(self) -> None:
        """Check the buffer ``initialized``. Once true, it is not read again: a read synchronizes with the device."""
        if not self._known_initialized:
            if not bool(self.initialized):
                raise RuntimeError("ActNorm was never initialised; call initialize() of the flow, or load weights")
            self._known_initialized = True

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._known_initialized = False
        super()._load_from_state_dict(*args, **kwargs)


class InvertibleConv(Layer):
    """A 1x1 convolution, ``y = W x`` at every pixel, initialised as a random rotation (section 3.2).

    ``dense``: W is the parameter; log|det W| costs O(C^3). ``lu``: W = P L (U + diag(sign exp(log_diagonal))) with
    fixed P and sign; log|det W| is the sum of ``log_diagonal``. Determinants and inverses are computed in fp64.

    Args:
        channels: number of channels C.
        kind: parametrisation of W, ``dense`` or ``lu``.
    """

    def __init__(self, channels: int, kind: Literal["dense", "lu"]) -> None:
        super().__init__()
        self.kind = kind
        self.permutation: Tensor
        self.sign: Tensor
        rotation = torch.linalg.qr(torch.randn(channels, channels)).Q
        if kind == "dense":
            self.weight = nn.Parameter(rotation)
            return
        permutation, lower, upper = torch.linalg.lu(rotation)
        diagonal = upper.diagonal()
        self.register_buffer("permutation", permutation)
        self.register_buffer("sign", diagonal.sign())
        self.lower = nn.Parameter(lower.tril(-1))
        self.upper = nn.Parameter(upper.triu(1))
        self.log_diagonal = nn.Parameter(diagonal.abs().log())

    def matrix(self) -> Float[Tensor, "C C"]:
        """The matrix W, in the precision of the parameters."""
        if self.kind == "dense":
            return self.weight
        lower, upper = self._triangles()
        return self.permutation @ lower @ upper

    def _map(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            if self.kind == "dense":
                log_det = torch.linalg.slogdet(self.weight.double()).logabsdet.to(x.dtype)
            else:
                log_det = self.log_diagonal.sum()
            return self._apply_matrix(self.matrix(), x), (log_det * (x.shape[2] * x.shape[3])).expand(len(x))

    def _invert(self, y: Tensor) -> Tensor:
        with torch.autocast(y.device.type, enabled=False):
            if self.kind == "dense":
                return self._apply_matrix(torch.linalg.inv(self.weight.double()), y)
            lower, upper = (triangle.double() for triangle in self._triangles())
            solved = torch.linalg.solve_triangular(lower, self.permutation.double().mT, upper=False, unitriangular=True)
            return self._apply_matrix(torch.linalg.solve_triangular(upper, solved, upper=True), y)

    def _triangles(self) -> tuple[Tensor, Tensor]:
        diagonal = torch.diag(self.sign * self.log_diagonal.exp())
        eye = torch.eye(len(diagonal), dtype=diagonal.dtype, device=diagonal.device)
        return self.lower.tril(-1) + eye, self.upper.triu(1) + diagonal

    @staticmethod
    def _apply_matrix(matrix: Tensor, x: Tensor) -> Tensor:
        # A matrix product, because cuDNN computes convolutions in TF32, which would make the inverse wrong by 1e-2.
        return torch.einsum("dc,bchw->bdhw", matrix.to(x.dtype), x)


class ZeroConv(nn.Module):
    """A 3x3 convolution that starts at zero, with a learned scale for each output channel.

    Args:
        inputs, outputs: numbers of channels.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel_size=3, padding=1)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)  # pyright: ignore[reportArgumentType]
        self.log_scale = nn.Parameter(torch.zeros(outputs))

    def forward(self, h: Float[Tensor, "B I H W"]) -> Float[Tensor, "B O H W"]:
        """Convolve and scale."""
        out = self.conv(h)
        return out * per_channel((_ZERO_CONV_GAIN * self.log_scale).exp(), out)


class CouplingNetwork(nn.Module):
    """A 3x3, a 1x1 and a zero-initialised 3x3 convolution, with ActNorm and ReLU between them.

    Args:
        inputs, outputs: numbers of channels.
        width: number of channels of the hidden feature maps.
    """

    def __init__(self, inputs: int, outputs: int, width: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(inputs, width, kernel_size=3, padding=1, bias=False)
        self.norm_in = ActNorm(width)
        self.conv_mid = nn.Conv2d(width, width, kernel_size=1, bias=False)
        self.norm_mid = ActNorm(width)
        self.conv_out = ZeroConv(width, outputs)
        for conv in (self.conv_in, self.conv_mid):
            nn.init.normal_(conv.weight, std=0.05)

    def forward(self, h: Float[Tensor, "B I H W"]) -> Float[Tensor, "B O H W"]:
        """Unbounded shifts and log-scales for the other half of the channels."""
        h = F.relu(self.norm_in(self.conv_in(h))[0])
        h = F.relu(self.norm_mid(self.conv_mid(h))[0])
        return self.conv_out(h)


class Coupling(Layer):
    """A coupling layer: a network reads the first half of the channels, and shifts and scales the second half.

    ``affine``: ``y = (x + shift) sigmoid(c tanh(raw / c) + 2)``; ``additive``: ``y = x + shift``. If C is odd, the
    second half is the larger. The published form has no bound c. Its scale can be arbitrarily small, and the
    inverse divides by it, so some samples overflow.

    Args:
        channels: number of channels C, at least 2.
        width: number of channels inside the network.
        kind: ``affine`` or ``additive``.
        bound: bound c; None for the published form.
    """

    def __init__(
        self, channels: int, width: int, kind: Literal["affine", "additive"], bound: float | None = None
    ) -> None:
        super().__init__()
        if channels < 2:
            raise ValueError(f"a coupling needs at least 2 channels (got {channels}); squeeze first")
        self.kind = kind
        self.bound = bound
        self.sizes = (channels // 2, channels - channels // 2)
        self.network = CouplingNetwork(self.sizes[0], self.sizes[1] * (2 if kind == "affine" else 1), width)

    def map_places(self, x: Float[Tensor, "B C H W"]) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B H W"]]:
        """See `Layer.map_places`; log-scales differ between pixels."""
        kept, changed = x.split(self.sizes, dim=1)
        shift, log_scale = self._shift_and_log_scale(kept)
        y, _ = _couple(kept, changed, shift, log_scale)
        return y, torch.zeros_like(x[:, 0]) if log_scale is None else log_scale.sum(dim=1)

    def _map(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept, changed = x.split(self.sizes, dim=1)
        return _couple(kept, changed, *self._shift_and_log_scale(kept))

    def _invert(self, y: Tensor) -> Tensor:
        kept, changed = y.split(self.sizes, dim=1)
        shift, log_scale = self._shift_and_log_scale(kept)
        return torch.cat([kept, _uncouple(changed, shift, log_scale)], dim=1)

    def rebuild(self, y: Float[Tensor, "B C H W"]) -> tuple[Leaves, Tensor, Tensor]:
        """Invert ``y``, and map the result forward again with an autograd graph, for `tarflow_scale.flows.recompute`.

        The network has the same input in both directions, so it runs once.

        Returns:
            The two halves of the input as leaves that require gradients; the output; and ``log_det``.
        """
        kept, changed = (part.detach() for part in y.split(self.sizes, dim=1))
        kept.requires_grad_()
        shift, log_scale = self._shift_and_log_scale(kept)
        with torch.no_grad():
            before = _uncouple(changed, shift, log_scale)
        before.requires_grad_()
        return (kept, before), *_couple(kept, before, shift, log_scale)

    def _shift_and_log_scale(self, kept: Tensor) -> tuple[Tensor, Tensor | None]:
        out = self.network(kept).to(kept.dtype)
        if self.kind == "additive":
            return out, None
        shift, raw = out.chunk(2, dim=1)
        if self.bound is not None:
            raw = self.bound * torch.tanh(raw / self.bound)
        return shift, F.logsigmoid(raw + _SIGMOID_SHIFT)


def _couple(kept: Tensor, changed: Tensor, shift: Tensor, log_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    changed = changed + shift
    if log_scale is None:
        return torch.cat([kept, changed], dim=1), changed.new_zeros(len(changed))
    return torch.cat([kept, changed * log_scale.exp()], dim=1), log_scale.sum(dim=(1, 2, 3))


def _uncouple(changed: Tensor, shift: Tensor, log_scale: Tensor | None) -> Tensor:
    return (changed if log_scale is None else changed * (-log_scale).exp()) - shift


def per_channel(values: Float[Tensor, " C"], like: Tensor) -> Float[Tensor, "C 1 1"]:
    """Reshape one value per channel to broadcast against feature maps, in the precision of ``like``."""
    return values.to(like.dtype)[:, None, None]
