"""Variational dequantization: a small flow, conditioned on the image, draws the noise inside the bin of each pixel.

Uniform noise makes a density that is constant on every bin, which a smooth model fits badly. If noise u' in (0, 1) is
drawn from q(u' | levels) instead, Jensen's inequality bounds the log probability of a discrete image by the mean of

    log p(x') - log q(u' | levels),        x' = 2 (level + u') / 2^n - 1

minus the constant D (n - 1) ln 2, because p is a density on [-1, 1]; see `tarflow_scale.flows.likelihood`. Training
maximises this bound over p and q (Flow++, Ho et al., arXiv 1902.00275, section 3.1). q is a second flow, which maps the
uniform noise u of the pipeline,

    u' = sigmoid(f(logit(u); levels)),        log q(u' | levels) = -log|du' / du|

where f consists of affine couplings. u has density 1 on a bin of width 1, and q is a density in the same units. A new f
is the identity, so that u' equals u to the last bit.

Shapes: B batch, C channels, H W pixels. Units: nats. The networks run in bf16 under autocast; everything else is
computed in the precision of ``x``, fp32 or wider.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["Dequantizer"]

_LOG_SCALE_BOUND = 2.0
"""Smooth bound c of log-scales, c tanh(raw / c)."""


class Dequantizer(nn.Module):
    """A flow on the noise of images, conditioned on their pixel levels.

    Only one direction is needed, because the density q is evaluated only at noise that the flow itself draws.

    Args:
        channels: number of channels C.
        couplings: number of couplings; each keeps the pixels that the previous one changed.
        width: number of channels inside each network.
    """

    def __init__(self, channels: int, couplings: int, width: int) -> None:
        super().__init__()
        self.couplings = nn.ModuleList(_Coupling(channels, number % 2, width) for number in range(couplings))

    def forward(
        self, x: Float[Tensor, "B C H W"], bit_depth: int
    ) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B C H W"]]:
        """Map images with uniform noise to images with learned noise, and return log q of that noise at every value.

        Args:
            x: images on [-1, 1]; each value stays in its bin.
            bit_depth: number of bits n of a pixel.
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
        # Add the change of u instead of u' itself: if u does not change, x is not rounded.
        moved = x + width * (torch.sigmoid(v) - torch.sigmoid(start))
        return _inside(moved, x, levels, width), _log_slope(start) - _log_slope(v) - log_scales


class _Coupling(nn.Module):
    """A coupling that maps every second pixel to ``v exp(c tanh(raw / c)) + shift``.

    Its network reads the other pixels and the levels. The last layer starts at zero, so a new coupling is the identity.
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
        """Return the new ``v`` and every value's log-scale (0 for kept values); ``seen``: levels, scaled to [-1, 1]."""
        kept = self._kept(v)
        # Noise near the edge of a bin has a very large logit, so the network reads tanh(v / 2) = 2 u - 1 instead.
        h = F.silu(self.conv_in(torch.cat([kept * torch.tanh(v / 2), seen], dim=1)))
        shift, raw = self.conv_out(F.silu(self.conv_mid(h))).to(v.dtype).chunk(2, dim=1)
        log_scale = (1 - kept) * _LOG_SCALE_BOUND * torch.tanh(raw / _LOG_SCALE_BOUND)
        return v * log_scale.exp() + (1 - kept) * shift, log_scale

    def _kept(self, v: Tensor) -> Tensor:
        """A checkerboard ``(H, W)``, 1 for kept pixels; not a buffer, because flows are loaded on the meta device."""
        rows, columns = (torch.arange(size, device=v.device) for size in v.shape[2:])
        return ((rows[:, None] + columns + self.parity) % 2 == 0).to(v.dtype)


def _log_slope(v: Tensor) -> Tensor:
    """Logarithm of the derivative of the sigmoid at ``v``."""
    return -F.softplus(v) - F.softplus(-v)


def _resolution(dtype: torch.dtype, bit_depth: int) -> float:
    """Minimum distance of ``u`` from the edges of its bin: half the resolution of ``u``. It keeps logits finite.

    Floats on [-1, 1] resolve ``u`` in steps of 2^(n - 2) epsilon: 2^-17 of a bin for 8 bits in fp32. A value that
    rounding puts on an edge is moved away from it by half a step.
    """
    return max(2.0 ** (bit_depth - 3), 1.0) * torch.finfo(dtype).eps


def _inside(moved: Tensor, x: Tensor, levels: Tensor, width: float) -> Tensor:
    """``moved``, clamped to the bin of ``x``, because rounding can move it outside."""
    low = levels * width - 1
    high = low + (width - 2 * torch.finfo(x.dtype).eps)  # the largest for which `(x + 1) / width` is below the edge
    return torch.clamp(moved, low, torch.maximum(high, x.detach()))
