"""Count the operations of a training step from the configuration, for the model FLOPs utilisation (MFU).

A multiplication and an addition count as two operations. The count includes matrix products and convolutions and
leaves out elementwise operations, as usual (Chowdhery et al., "PaLM", arXiv 2204.02311, appendix B). The tests compare
it with `torch.utils.flop_counter`, which cannot replace the formulas: it counts the masked half of causal attention,
and on tensors without data it cannot run ActNorm and ODE solvers, which read values.

TarFlow, for a block of K layers with width C, on T tokens with F features:

    2 T C (F + out) + K (24 T C^2 + 2 T^2 C)        out = 2 F (affine) or F; causal attention is half of 4 T^2 C

Glow, for a step on P pixels with c channels; a network of width W reads half of the channels:

    2 P (c^2 + 9 (c / 2) W + W^2 + 9 W out)         out = c (affine) or c / 2

plus 2 P 9 (c / 2) c for the prior of every level except the last. RealNVP, for a coupling with R residual blocks:

    2 P (9 c W + 18 R W^2 + 9 W 2 c)

NICE and MAF: twice the number of weights of their linear layers. IAF: the same in each of D + 1 passes. Continuous
flow: all evaluations of the dynamics, each with the Jacobian product that estimates the trace. For an adaptive
solver only one step is counted, so the utilisation is a lower bound. Each coupling of a dequantizer, on P pixels with c
channels and with a network of width W, adds

    2 P 9 (2 c W + W^2 + W 2 c)
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from tarflow_scale.capacity.convolutions import autoencoder_flops
from tarflow_scale.config.autoencoder import ConvolutionalConfig
from tarflow_scale.config.model import (
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
from tarflow_scale.flows.realnvp import CHANNEL_MASKS, CHECKERBOARDS, LAST_CHECKERBOARDS
from tarflow_scale.flows.vector_realnvp import COUPLINGS

__all__ = ["STAGES", "forward_flops", "linear_flops", "realnvp_couplings", "tokens_per_image", "training_flops"]


def forward_flops(config: ModelConfig | ConvolutionalConfig, event_shape: tuple[int, ...]) -> float:
    """Operations of ``flow(x, dequantize=True)``, or of an autoencoder, for one image ``(C, H, W)``."""
    if isinstance(config, ConvolutionalConfig):
        return autoencoder_flops(config, event_shape)
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
            return COUPLINGS * config.levels * linear_flops([half, config.width, *[config.width] * blocks, 2 * half])
        case RealNVPConfig():
            return sum(
                2.0 * pixels * (27 * channels * width + 18 * config.residual_blocks * width**2)
                for pixels, channels, width in realnvp_couplings(config, event_shape)
            )
        case NICEConfig():
            half = math.prod(event_shape) / 2
            return config.couplings * linear_flops([half, *[config.width] * config.hidden_layers, half])
        case MAFConfig() | IAFConfig():
            dims = math.prod(event_shape)
            inputs = dims + config.label_width * config.class_conditional
            flops = config.transforms * linear_flops([inputs, *config.hidden_widths, 2 * dims])
            return flops if config.kind == "maf" else (dims + 1) * flops
        case ContinuousConfig():
            evaluations = STAGES[config.solver] * (config.num_steps if config.solver in ("rk4", "midpoint") else 1)
            size = 9 * event_shape[1] * event_shape[2] if len(event_shape) == 3 else 1
            widths = [event_shape[0], *[config.width] * config.hidden_layers, event_shape[0]]
            return 3 * size * evaluations * linear_flops(widths)


def training_flops(config: ModelConfig | ConvolutionalConfig, event_shape: tuple[int, ...]) -> float:
    """Operations of a training step per image; the backward pass takes twice as many as the forward pass.

    Recomputed activations are not counted, so recomputation does not raise the utilisation.
    """
    return 3 * forward_flops(config, event_shape)


def tokens_per_image(config: ModelConfig | ConvolutionalConfig, event_shape: tuple[int, ...]) -> int | None:
    """Number of tokens per image in a TarFlow; None for models without tokens."""
    if not isinstance(config, TarFlowConfig):
        return None
    _, height, width = event_shape
    return (height // config.patch_size) * (width // config.patch_size)


STAGES = {"dopri5": 7, "bosh3": 4, "rk4": 4, "midpoint": 2}
"""Number of evaluations of the dynamics per step, by solver."""


def linear_flops(widths: Sequence[int | float]) -> float:
    """Operations of one pass through linear layers of these widths: twice the number of weights."""
    return sum(2.0 * a * b for a, b in pairwise(widths))


def realnvp_couplings(config: RealNVPConfig, event_shape: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    """For each coupling of a RealNVP for images: number of pixels, number of channels, and width of its network."""
    (channels, rows, columns), width = event_shape, config.width
    for _ in range(config.levels - 1):
        yield from [(rows * columns, channels, width)] * CHECKERBOARDS
        channels, rows, columns, width = 4 * channels, rows // 2, columns // 2, 2 * width
        yield from [(rows * columns, channels, width)] * CHANNEL_MASKS
        channels //= 2
    yield from [(rows * columns, channels, width)] * LAST_CHECKERBOARDS


def _tarflow(config: TarFlowConfig, event_shape: tuple[int, ...]) -> float:
    tokens = tokens_per_image(config, event_shape)
    assert tokens is not None
    features = event_shape[0] * config.patch_size**2
    out = features * (2 if config.variant == "affine" else 1)
    squares = 2 + 2 / config.queries_per_key + (12 if config.mlp == "gated" else 8)  # weights of a layer / width^2
    total = 0.0
    for index, (layers, width) in enumerate(zip(config.layers_per_block, config.block_widths, strict=True)):
        read = tokens + config.has_prefix(index)
        layer = 2.0 * read * squares * width**2 + 2.0 * read**2 * width
        total += 2.0 * tokens * width * (features + out) + layers * layer
    return total


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
