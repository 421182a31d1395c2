"""Variational dequantization: noise inside the bins of pixels, by a small flow that knows the image.

Uniform noise makes a density that is flat on every bin, which a smooth model is bad at. Where noise u' in (0, 1) is
drawn from q(u' | levels) instead, Jensen's inequality bounds the log probability of a discrete image by the mean of

    log p(x') - log q(u' | levels),        x' = 2 (level + u') / 2^n - 1

on [-1, 1], up to the D (n - 1) ln 2 that `tarflow_scale.flows.likelihood` knows; both are learned by it (Flow++, Ho et
al., arXiv 1902.00275, section 3.1). q is a flow of its own, whose base is the uniform noise u of the pipeline,

    u' = sigmoid(f(logit(u); levels)),        log q(u' | levels) = -log|du' / du|

f being affine couplings. The base has density 1 on a bin of width 1, and q counts in these units too. A fresh f is the
identity, and u' then is u to the last bit.

Shapes: B batch, C channels, H W pixels, W' channels of a network. Units: nats. What lies between networks is computed
in the precision of ``x``, fp32 or wider; only the networks run in bf16 under autocast.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["Dequantizer"]

_LOG_SCALE_BOUND = 2.0
"""Smooth bound c of log-scales, c tanh(raw / c)."""


class Dequantizer(nn.Module):
    """A flow on the noise of images, conditioned on their levels.

    Both directions of it are never needed: noise is drawn, and its density is that of the draw.

    Args:
        channels: C.
        couplings: how many; from one to the next the kept pixels are those that the one before changed.
        width: channels of each network.
    """

    def __init__(self, channels: int, couplings: int, width: int) -> None:
        super().__init__()
        self.couplings = nn.ModuleList(_Coupling(channels, number % 2, width) for number in range(couplings))

    def forward(
        self, x: Float[Tensor, "B C H W"], bit_depth: int
    ) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B C H W"]]:
        """Images under uniform noise to images under learned noise, and log q of that noise at every value.

        Args:
            x: on [-1, 1]; each value stays in the bin that it lies in.
            bit_depth: n.
        """
        width = 2.0 / 2**bit_depth
        levels = torch.floor((x.detach() + 1) / width).clamp(0, 2**bit_depth - 1)
        eps = _resolution(x.dtype, bit_depth)
        u = ((x + 1) / width - levels).clamp(eps, 1 - eps)
        start = v = torch.log(u) - torch.log1p(-u)
        seen = levels * (2 / (2**bit_depth - 1)) - 1
        log_scales = torch.zeros_like(v)
        for coupling in self.couplings:
            v, log_scale = coupling(v, seen)
            log_scales = log_scales + log_scale
        # The move of u, not u' itself, is added to x: where nothing moves, nothing is rounded.
        moved = x + width * (torch.sigmoid(v) - torch.sigmoid(start))
        return _inside(moved, x, levels, width), _log_slope(start) - _log_slope(v) - log_scales


class _Coupling(nn.Module):
    """``v exp(c tanh(raw / c)) + shift`` on every other pixel, both by a network that reads the others and the levels.

    Its last layer starts at zero, so that a fresh coupling is the identity.
    """

    def __init__(self, channels: int, parity: int, width: int) -> None:
        super().__init__()
        self.parity = parity
        self.conv_in = nn.Conv2d(2 * channels, width, kernel_size=3, padding=1)
        self.conv_mid = nn.Conv2d(width, width, kernel_size=3, padding=1)
        self.conv_out = nn.Conv2d(width, 2 * channels, kernel_size=3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)  # pyright: ignore[reportArgumentType]

    def forward(
        self, v: Float[Tensor, "B C H W"], seen: Float[Tensor, "B C H W"]
    ) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B C H W"]]:
        """The new ``v``, and its log-scale at every value, 0 where it is kept; ``seen`` are levels on [-1, 1]."""
        kept = self._kept(v)
        # Noise near an edge has a logit that is far from all others; as noise on [-1, 1] it is one like them.
        h = F.silu(self.conv_in(torch.cat([kept * torch.tanh(v / 2), seen], dim=1)))
        shift, raw = self.conv_out(F.silu(self.conv_mid(h))).to(v.dtype).chunk(2, dim=1)
        log_scale = (1 - kept) * _LOG_SCALE_BOUND * torch.tanh(raw / _LOG_SCALE_BOUND)
        return v * log_scale.exp() + (1 - kept) * shift, log_scale

    def _kept(self, v: Tensor) -> Tensor:
        """A checkerboard ``(H, W)``; computed at every call, because a flow is loaded on the meta device."""
        rows, columns = (torch.arange(size, device=v.device) for size in v.shape[2:])
        return ((rows[:, None] + columns + self.parity) % 2 == 0).to(v.dtype)


def _log_slope(v: Tensor) -> Tensor:
    """Logarithm of the derivative of the sigmoid."""
    return -F.softplus(v) - F.softplus(-v)


def _resolution(dtype: torch.dtype, bit_depth: int) -> float:
    """How near noise comes to the edges of a bin: half the distance of floats there, so that logits are finite.

    Floats on [-1, 1] know u up to 2^(n - 2) epsilon: 2^-17 of a bin of 8 bits. What they round to an edge counts as
    half of that away from it.
    """
    return max(2.0 ** (bit_depth - 3), 1.0) * torch.finfo(dtype).eps


def _inside(moved: Tensor, x: Tensor, levels: Tensor, width: float) -> Tensor:
    """``moved``, but in the bin of ``x`` also where rounding would take it out."""
    low = levels * width - 1
    high = low + (width - 2 * torch.finfo(x.dtype).eps)  # as near to the edge as `(x + 1) / width` can tell from it
    return torch.clamp(moved, low, torch.maximum(high, x.detach()))
