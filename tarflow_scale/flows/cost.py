"""Floating-point operations of a flow, from its configuration alone: what utilisation is a fraction of.

A multiplication and an addition are two operations. Counted are the matrix products and convolutions; what is done
element by element is left out, as is usual (Chowdhery et al., "PaLM", arXiv 2204.02311, appendix B).

TarFlow, a block of K layers of width C on T tokens of F features:

    2 T C (F + out) + K (24 T C^2 + 2 T^2 C)        out = 2 F (affine) or F; causal attention is half of 4 T^2 C

Glow, a step on P pixels of c channels, half of which pass a network of width W:

    2 P (c^2 + 9 (c / 2) W + W^2 + 9 W out)         out = c (affine) or c / 2

and for every level but the last 2 P 9 (c / 2) c for its prior.
"""

from tarflow_scale.config import GlowConfig, ModelConfig, TarFlowConfig

__all__ = ["forward_flops", "tokens_per_image", "training_flops"]


def forward_flops(config: ModelConfig, event_shape: tuple[int, int, int]) -> float:
    """Operations of ``flow(x)`` for one image ``(C, H, W)``."""
    match config:
        case TarFlowConfig():
            return _tarflow(config, event_shape)
        case GlowConfig():
            return _glow(config, event_shape)


def training_flops(config: ModelConfig, event_shape: tuple[int, int, int]) -> float:
    """Operations of a training step for one image: forward, and twice as many backward.

    What a step computes again to save memory is not counted, so that utilisation does not reward it.
    """
    return 3 * forward_flops(config, event_shape)


def tokens_per_image(config: ModelConfig, event_shape: tuple[int, int, int]) -> int | None:
    """T of TarFlow; None for models without tokens."""
    if not isinstance(config, TarFlowConfig):
        return None
    _, height, width = event_shape
    return (height // config.patch_size) * (width // config.patch_size)


def _tarflow(config: TarFlowConfig, event_shape: tuple[int, int, int]) -> float:
    tokens = tokens_per_image(config, event_shape)
    assert tokens is not None
    features = event_shape[0] * config.patch_size**2
    out = features * (2 if config.variant == "affine" else 1)
    layer = 24.0 * tokens * config.width**2 + 2.0 * tokens**2 * config.width
    ends = 2.0 * tokens * config.width * (features + out)
    return sum(ends + layers * layer for layers in config.layers_per_block)


def _glow(config: GlowConfig, event_shape: tuple[int, int, int]) -> float:
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
