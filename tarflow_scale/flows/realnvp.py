"""RealNVP for images: masked affine couplings with residual networks, at several resolutions.

Dinh et al., "Density estimation using Real NVP", arXiv 1605.08803. Each level except the last has three couplings with
checkerboard masks, a squeeze, and three couplings with masks that select half of the channels. Then half of the
channels go on to the next level. The last level has four couplings with checkerboard masks and no squeeze (section
3.6). A coupling keeps the values that its mask m selects and changes the rest,

    y = m x + (1 - m) (x exp(s) + t),        log|det| = sum (1 - m) s,        s, t = network(m x)

A normalisation follows each coupling (section 3.7). The published kind is ``batch``. In training it updates its running
statistics with the statistics of the batch over all ranks, and then normalises by them; gradients flow through the
batch statistics. So in training, results depend on the division of a batch into micro batches, and a run cannot
continue with another division. In evaluation the running statistics are fixed, and each image is mapped independently.

Differences from the published model: log-scales are bounded by c tanh(raw / c), where c is not learned. Residual
networks have ActNorm instead of weight and batch normalisation, so that they treat each image separately; their last
convolution starts at zero. Latents have a learned mean and deviation for each channel, which a label shifts, as in
Glow. The moving average of the weights uses the running statistics of the trained weights.

Shapes: B batch, C channels, H W pixels. log_det: nats, summed over dimensions.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tarflow_scale.config.model import RealNVPConfig
from tarflow_scale.flows.coupling import ActNorm, Layer, Normalization, ZeroConv, per_channel, statistics
from tarflow_scale.flows.multiscale import Level, MultiScaleFlow, Step
from tarflow_scale.runtime.distributed import all_reduce_sum, all_reduce_sum_with_gradient

__all__ = [
    "CHANNEL_MASKS",
    "CHECKERBOARDS",
    "LAST_CHECKERBOARDS",
    "BatchNorm",
    "MaskedCoupling",
    "RealNVP",
    "ResidualNetwork",
]

CHECKERBOARDS, CHANNEL_MASKS, LAST_CHECKERBOARDS = 3, 3, 4
"""Number of couplings before the squeeze of a level, after the squeeze, and in the last level, which has no squeeze."""
_BATCH_SHARE = 0.1
"""Weight of the batch in the running statistics, which a training step updates before it uses them."""
_VARIANCE_FLOOR = 1e-5


class BatchNorm(Normalization):
    """Normalises each channel to mean 0 and deviation 1, by statistics that training updates with each batch.

    Args:
        channels: number of channels C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.running_mean: Tensor
        self.running_variance: Tensor
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_variance", torch.ones(channels))

    @torch.no_grad()
    def initialize(self, x: Float[Tensor, "B C H W"]) -> None:
        """Set the running statistics to the statistics of ``x`` over all ranks."""
        mean, variance = statistics(x, all_reduce_sum)
        self.running_mean.copy_(mean)
        self.running_variance.copy_(variance)

    def _map(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, variance = self._mixed(x) if self.training else (self.running_mean, self.running_variance)
        log_scale = -0.5 * torch.log(variance + _VARIANCE_FLOOR)
        y = (x - per_channel(mean, x)) * per_channel(log_scale.exp(), x)
        return y, (log_scale.sum() * (x.shape[2] * x.shape[3])).to(x.dtype).expand(len(x))

    def _invert(self, y: Tensor) -> Tensor:
        std = (self.running_variance + _VARIANCE_FLOOR).sqrt()
        return y * per_channel(std, y) + per_channel(self.running_mean, y)

    def _mixed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        of_batch = statistics(x, all_reduce_sum_with_gradient)
        stored = (self.running_mean, self.running_variance)
        # The graph keeps copies of the buffers, because the buffers are overwritten below.
        mean, variance = (torch.lerp(old.to(new), new, _BATCH_SHARE) for old, new in zip(stored, of_batch, strict=True))
        with torch.no_grad():
            for old, new in zip(stored, (mean, variance), strict=True):
                old.copy_(new)
        return mean, variance


class ResidualNetwork(nn.Module):
    """A convolution, residual blocks of two convolutions each, and a convolution that starts at zero.

    Args:
        inputs, outputs: numbers of channels.
        width: number of channels of the hidden feature maps.
        blocks: number of residual blocks.
    """

    def __init__(self, inputs: int, outputs: int, width: int, blocks: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(inputs, width, kernel_size=3, padding=1)
        self.blocks = nn.ModuleList(_ResidualBlock(width) for _ in range(blocks))
        self.norm_out = ActNorm(width)
        self.conv_out = ZeroConv(width, outputs)

    def forward(self, h: Float[Tensor, "B I H W"]) -> Float[Tensor, "B O H W"]:
        """Shifts and unbounded log-scales for a coupling."""
        h = self.conv_in(h)
        for block in self.blocks:
            h = block(h)
        return self.conv_out(F.relu(self.norm_out(h)[0]))


class _ResidualBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(ActNorm(width) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False) for _ in range(2))

    def forward(self, h: Tensor) -> Tensor:
        change = h
        for norm, conv in zip(self.norms, self.convs, strict=True):
            change = conv(F.relu(norm(change)[0]))
        return h + change


class MaskedCoupling(Layer):
    """An affine coupling that keeps the values where its mask is 1 and changes the others.

    Args:
        channels: number of channels C.
        pattern: ``checkerboard`` keeps every second pixel; ``channels`` keeps half of the channels.
        parity: 0 or 1; selects one of the two complementary masks.
        width: number of channels inside the network.
        blocks: number of residual blocks of the network.
        bound: bound c of the log-scales.
    """

    def __init__(
        self,
        channels: int,
        pattern: Literal["checkerboard", "channels"],
        parity: int,
        width: int,
        blocks: int,
        bound: float,
    ) -> None:
        super().__init__()
        self.pattern = pattern
        self.parity = parity
        self.bound = bound
        self.network = ResidualNetwork(channels, 2 * channels, width, blocks)

    def map_places(self, x: Float[Tensor, "B C H W"]) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B H W"]]:
        """See `Layer.map_places`; log-scales differ between pixels."""
        shift, log_scale = self._shift_and_log_scale(x)
        return x * log_scale.exp() + shift, log_scale.sum(dim=1)

    def _map(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale = self._shift_and_log_scale(x)
        return x * log_scale.exp() + shift, log_scale.sum(dim=(1, 2, 3))

    def _invert(self, y: Tensor) -> Tensor:
        shift, log_scale = self._shift_and_log_scale(y)
        return (y - shift) * (-log_scale).exp()

    def _shift_and_log_scale(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and log-scale, both 0 where the mask is 1; ``x`` may be the input or the output of the coupling."""
        mask = self._mask(x)
        shift, raw = self.network(mask * x).to(x.dtype).chunk(2, dim=1)
        return (1 - mask) * shift, (1 - mask) * self.bound * torch.tanh(raw / self.bound)

    def _mask(self, x: Tensor) -> Tensor:
        """The mask, 1 where ``x`` is kept, of shape ``(C, 1, 1)`` or ``(1, H, W)``."""
        _, channels, height, width = x.shape
        if self.pattern == "channels":
            first = torch.arange(channels, device=x.device)[:, None, None] < channels // 2
            return (first == (self.parity == 0)).to(x.dtype)
        rows, columns = (torch.arange(size, device=x.device) for size in (height, width))
        return ((rows[:, None] + columns + self.parity) % 2 == 0)[None].to(x.dtype)


class _Step(Step):
    """A coupling and a normalisation."""

    def __init__(self, couple: MaskedCoupling, norm: Normalization) -> None:
        super().__init__()
        self.couple = couple
        self.norm = norm

    def layers(self) -> tuple[Layer, ...]:
        return (self.couple, self.norm)


class RealNVP(MultiScaleFlow):
    """A multi-scale flow of masked couplings.

    Args:
        event_shape: ``(C, H, W)``; H and W must be multiples of ``2^(levels - 1)``.
        num_classes: number of classes; None for an unconditional model.
        config: the section ``model``.

    Raises:
        ValueError: the image cannot be squeezed on every level, or its last feature maps have a single pixel.
    """

    def __init__(self, event_shape: tuple[int, int, int], num_classes: int | None, config: RealNVPConfig) -> None:
        super().__init__(event_shape, num_classes, config.logit_alpha)
        self.capabilities = config.capabilities  # recomputation would count a batch twice in running statistics
        (channels, rows, columns), width = event_shape, config.width
        factor = 2 ** (config.levels - 1)
        if rows % factor or columns % factor or rows * columns == factor**2:
            raise ValueError(
                f"image height and width must be multiples of 2^(model.levels - 1), and at least one must exceed it "
                f"(got {rows}x{columns} and {factor}); choose fewer levels"
            )
        norm = ActNorm if config.normalization == "actnorm" else BatchNorm

        def steps(pattern: Literal["checkerboard", "channels"], num: int) -> list[_Step]:
            network = (width, config.residual_blocks, config.log_scale_bound)
            couplings = (MaskedCoupling(channels, pattern, number % 2, *network) for number in range(num))
            return [_Step(coupling, norm(channels)) for coupling in couplings]

        for _ in range(config.levels - 1):
            before = steps("checkerboard", CHECKERBOARDS)
            channels, rows, columns, width = 4 * channels, rows // 2, columns // 2, 2 * width
            after = steps("channels", CHANNEL_MASKS)
            level = Level(after, channels, True, num_classes, before, prior_sees_rest=False)
            self.add_level(level, channels, rows, columns)
            channels = level.passed_on
        last = steps("checkerboard", LAST_CHECKERBOARDS)
        self.add_level(
            Level(last, channels, False, num_classes, squeezes=False, prior_sees_rest=False), channels, rows, columns
        )
