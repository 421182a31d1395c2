"""Operations and memory of a training step, from a configuration alone.

Floating-point operations are what utilisation is a fraction of.

A multiplication and an addition are two operations. Counted are the matrix products and convolutions; what is done
element by element is left out, as is usual (Chowdhery et al., "PaLM", arXiv 2204.02311, appendix B).

TarFlow, a block of K layers of width C on T tokens of F features:

    2 T C (F + out) + K (24 T C^2 + 2 T^2 C)        out = 2 F (affine) or F; causal attention is half of 4 T^2 C

Glow, a step on P pixels of c channels, half of which pass a network of width W:

    2 P (c^2 + 9 (c / 2) W + W^2 + 9 W out)         out = c (affine) or c / 2

and for every level but the last 2 P 9 (c / 2) c for its prior. RealNVP, a coupling with R residual blocks:

    2 P (9 c W + 18 R W^2 + 9 W 2 c)

NICE, MAF: twice the weights of their linear layers; IAF scores in D + 1 such passes. A continuous flow evaluates its
dynamics as often as its solver likes: counted are those of one step, each with the product for its trace, so its
utilisation is a lower bound. A coupling of learned noise adds, on P pixels of c channels and in a network of width W,

    2 P 9 (2 c W + W^2 + W 2 c)
"""

import math
from collections.abc import Sequence
from itertools import pairwise

from tarflow_scale.config import (
    ContinuousConfig,
    DequantizationConfig,
    GlowConfig,
    IAFConfig,
    MAFConfig,
    ModelConfig,
    NICEConfig,
    RealNVPConfig,
    TarFlowConfig,
)
from tarflow_scale.flows.flow import Activations
from tarflow_scale.flows.memory import ANCHOR_EVERY
from tarflow_scale.flows.realnvp import CHANNEL_MASKS, CHECKERBOARDS, LAST_CHECKERBOARDS
from tarflow_scale.flows.vector_realnvp import COUPLINGS

__all__ = ["estimated_activation_bytes", "forward_flops", "tokens_per_image", "training_flops"]


def forward_flops(config: ModelConfig, event_shape: tuple[int, ...]) -> float:
    """Operations of ``flow(x, dequantize=True)`` for one image ``(C, H, W)``."""
    return _encoding_flops(config, event_shape) + _dequantizer_flops(config.dequantization, event_shape)


def _dequantizer_flops(config: DequantizationConfig | None, event_shape: tuple[int, ...]) -> float:
    if config is None:
        return 0.0
    channels, rows, columns = event_shape
    network = 2 * channels * config.width + config.width**2 + config.width * 2 * channels
    return config.couplings * 18.0 * rows * columns * network


def _encoding_flops(config: ModelConfig, event_shape: tuple[int, ...]) -> float:
    match config:
        case TarFlowConfig():
            return _tarflow(config, event_shape)
        case GlowConfig():
            return _glow(config, event_shape)
        case RealNVPConfig() if len(event_shape) == 1:
            half, blocks = event_shape[0] / 2, 2 * config.residual_blocks
            return COUPLINGS * config.levels * _linear([half, config.width, *[config.width] * blocks, 2 * half])
        case RealNVPConfig():
            return _realnvp(config, event_shape)
        case NICEConfig():
            half = math.prod(event_shape) / 2
            return config.couplings * _linear([half, *[config.width] * config.hidden_layers, half])
        case MAFConfig() | IAFConfig():
            dims = math.prod(event_shape)
            inputs = dims + config.label_width * config.class_conditional
            one_pass = config.transforms * _linear([inputs, *config.hidden_widths, 2 * dims])
            return one_pass if config.kind == "maf" else (dims + 1) * one_pass
        case ContinuousConfig():
            evaluations = _STAGES[config.solver] * (config.num_steps if config.solver in ("rk4", "midpoint") else 1)
            size = 9 * event_shape[1] * event_shape[2] if len(event_shape) == 3 else 1
            return (
                3
                * size
                * evaluations
                * _linear([event_shape[0], *[config.width] * config.hidden_layers, event_shape[0]])
            )


def training_flops(config: ModelConfig, event_shape: tuple[int, ...]) -> float:
    """Operations of a training step for one image: forward, and twice as many backward.

    What a step computes again to save memory is not counted, so that utilisation does not reward it.
    """
    return 3 * forward_flops(config, event_shape)


def tokens_per_image(config: ModelConfig, event_shape: tuple[int, ...]) -> int | None:
    """T of TarFlow; None for models without tokens."""
    if not isinstance(config, TarFlowConfig):
        return None
    _, height, width = event_shape
    return (height // config.patch_size) * (width // config.patch_size)


_STAGES = {"dopri5": 7, "bosh3": 4, "rk4": 4, "midpoint": 2}


def _linear(widths: Sequence[int | float]) -> float:
    return sum(2.0 * a * b for a, b in pairwise(widths))


def _realnvp(config: RealNVPConfig, event_shape: tuple[int, ...]) -> float:
    total, width = 0.0, config.width
    channels, rows, columns = event_shape

    def couplings(num: int) -> float:
        network = 27 * channels * width + 18 * config.residual_blocks * width**2
        return num * 2.0 * rows * columns * network

    for _ in range(config.levels - 1):
        total += couplings(CHECKERBOARDS)
        channels, rows, columns, width = 4 * channels, rows // 2, columns // 2, 2 * width
        total += couplings(CHANNEL_MASKS)
        channels //= 2
    return total + couplings(LAST_CHECKERBOARDS)


def _tarflow(config: TarFlowConfig, event_shape: tuple[int, ...]) -> float:
    tokens = tokens_per_image(config, event_shape)
    assert tokens is not None
    features = event_shape[0] * config.patch_size**2
    out = features * (2 if config.variant == "affine" else 1)
    layer = 24.0 * tokens * config.width**2 + 2.0 * tokens**2 * config.width
    ends = 2.0 * tokens * config.width * (features + out)
    return sum(ends + layers * layer for layers in config.layers_per_block)


def _glow(config: GlowConfig, event_shape: tuple[int, ...]) -> float:
    channels, height, width = event_shape
    total = 0.0
    for level in range(config.levels):
        channels, height, width = 4 * channels, height // 2, width // 2
        pixels, changed = height * width, channels - channels // 2
        kept, out = channels // 2, changed * (2 if config.coupling == "affine" else 1)
        network = 9 * kept * config.width + config.width**2 + 9 * config.width * out
        total += config.steps_per_level * 2.0 * pixels * (channels**2 + network)
        if level < config.levels - 1:
            channels -= changed
            total += 2.0 * pixels * 9 * channels * 2 * changed
    return total


def estimated_activation_bytes(
    config: ModelConfig, event_shape: tuple[int, ...], batch: int, activations: Activations, bf16: bool
) -> float:
    """About what a training step keeps for its backward pass, in bytes.

    A transformer layer keeps about 18 vectors of its width per token, a step of Glow 6 of its width and 10 of its
    channels per pixel, a residual block of RealNVP 4 of its width, a linear layer its output twice; in bf16 the
    networks' part is half. A coupling of learned noise keeps about 4 of its width and 18 of its channels per pixel,
    whatever the flow does for its own.
    """
    network = 2 if bf16 else 4
    noise = config.dequantization
    kept = 0.0
    if noise is not None:
        channels, rows, columns = event_shape
        kept = noise.couplings * batch * rows * columns * (4.0 * network * noise.width + 72.0 * channels)
    return kept + _encoding_bytes(config, event_shape, batch, activations, network)


def _encoding_bytes(
    config: ModelConfig, event_shape: tuple[int, ...], batch: int, activations: Activations, network: int
) -> float:
    match config:
        case TarFlowConfig():
            _, height, width = event_shape
            vector = float(batch * (height // config.patch_size) * (width // config.patch_size) * config.width)
            layers = sum(config.layers_per_block)
            if activations == "keep":
                return 18 * network * vector * layers
            return 4 * vector * layers + 18 * network * vector
        case GlowConfig():
            channels, height, width = event_shape
            total, largest, maps = 0.0, 0.0, 0.0
            for level in range(config.levels):
                at_level = channels * 2 ** (level + 2)
                pixels = batch * (height >> (level + 1)) * (width >> (level + 1))
                step = pixels * (6.0 * network * config.width + 40.0 * at_level)
                total += config.steps_per_level * step
                maps += config.steps_per_level * 4.0 * pixels * at_level
                largest = max(largest, step)
            return {"keep": total, "checkpoint": maps + largest, "rebuild": maps / ANCHOR_EVERY + largest}[activations]
        case RealNVPConfig() if len(event_shape) == 1:
            hidden = 2.0 * network * config.width * (2 * config.residual_blocks + 1)
            kept = COUPLINGS * config.levels if activations == "keep" else 1
            return batch * (kept * hidden + 8.0 * COUPLINGS * config.levels * event_shape[0])
        case RealNVPConfig():
            return _realnvp_bytes(config, event_shape, batch, activations, network)
        case NICEConfig():
            kept = config.couplings if activations == "keep" else 1
            hidden = 2.0 * network * config.width * config.hidden_layers
            return batch * (kept * hidden + 4.0 * config.couplings * math.prod(event_shape))
        case MAFConfig() | IAFConfig():
            passes = 1 if config.kind == "maf" else math.prod(event_shape)
            kept = config.transforms if activations == "keep" else 1
            hidden = passes * (8.0 * sum(config.hidden_widths) + 16.0 * math.prod(event_shape))
            return batch * (kept * hidden + 4.0 * config.transforms * math.prod(event_shape))
        case ContinuousConfig():
            places = math.prod(event_shape[1:])
            evaluation = 24.0 * batch * places * config.width * config.hidden_layers
            steps = config.num_steps if config.solver in ("rk4", "midpoint") else 5
            return evaluation * (1 if config.gradients == "adjoint" else steps * _STAGES[config.solver])


def _realnvp_bytes(
    config: RealNVPConfig, event_shape: tuple[int, ...], batch: int, activations: Activations, network: int
) -> float:
    channels, rows, columns = event_shape
    total, largest, maps, width = 0.0, 0.0, 0.0, config.width

    def couplings(num: int) -> None:
        nonlocal total, largest, maps
        pixels = batch * rows * columns
        one = pixels * (network * width * (4.0 * config.residual_blocks + 3) + 40.0 * channels)
        total, largest, maps = total + num * one, max(largest, one), maps + num * 4.0 * pixels * channels

    for _ in range(config.levels - 1):
        couplings(CHECKERBOARDS)
        channels, rows, columns, width = 4 * channels, rows // 2, columns // 2, 2 * width
        couplings(CHANNEL_MASKS)
        channels //= 2
    couplings(LAST_CHECKERBOARDS)
    return total if activations == "keep" else maps + largest
