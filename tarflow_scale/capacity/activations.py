"""Estimate the memory of activations in a training step from the configuration.

Autograd saves the tensors that the backward pass needs, each tensor once. A number takes n bytes inside networks (n = 2
under bf16 autocast, otherwise 4), and 4 bytes elsewhere. The tests compare the following formulas with the tensors that
PyTorch saves:

* TarFlow. A transformer layer of width C saves ``8 C + 14 n C`` bytes per token. The inputs of both LayerNorms take 4
  bytes per number. The outputs of both LayerNorms, the queries, keys and values, the output of attention, and 4 C
  numbers before and after GELU take n bytes per number. A block with D features per token also saves the input of its
  last linear layer, and 3 D numbers for the affine map (D if it is volume-preserving, 4 D if log-scales are bounded).
* Glow. A step on c channels with a network of width W saves ``4 n W`` bytes per pixel inside the network, and up to
  ``26 c`` outside it (see `_AROUND_COUPLING`). An LU-parametrised 1x1 convolution saves eight c x c matrices.
* RealNVP. A coupling on c channels with a network of width W saves ``4 n W`` bytes per pixel for each residual block,
  ``2 n W`` for the rest of the network, and ``40 c`` outside the network.
* NICE and RealNVP for vectors save one tensor per hidden layer.
* MAF on D dimensions saves one tensor per hidden layer, 4.3 D numbers outside the network, and a masked copy of every
  weight. IAF saves the same in each of D + 1 passes.

A unit is a layer, step or coupling. If activations are checkpointed, only the feature maps between units are saved; if
they are rebuilt, only one in `ANCHOR_EVERY` of these maps. In both cases all activations of the unit through which the
backward pass is running are in memory too. `Footprint.working` also counts the gradients inside that unit, about 1.5
times its largest feature map.
"""

import math
from dataclasses import dataclass

from tarflow_scale.capacity.convolutions import autoencoder_activations
from tarflow_scale.capacity.flops import STAGES, linear_flops, realnvp_couplings
from tarflow_scale.config.autoencoder import ConvolutionalConfig
from tarflow_scale.config.model import (
    Activations,
    ContinuousConfig,
    GlowConfig,
    IAFConfig,
    MAFConfig,
    ModelConfig,
    NICEConfig,
    RealNVPConfig,
    TarFlowConfig,
)
from tarflow_scale.flows.recompute import ANCHOR_EVERY
from tarflow_scale.flows.vector_realnvp import COUPLINGS

__all__ = ["Footprint", "activation_footprint"]


_AROUND_COUPLING = {("affine", 4): 26.0, ("affine", 2): 20.0, ("additive", 4): 14.0, ("additive", 2): 9.0}
"""Bytes per channel and pixel that a step of Glow keeps for the backward pass: the feature maps before and after the
convolution, and the input, shift and scale of the network, without activations inside the network. The key is a pair:
the kind of coupling, and the bytes of one value inside the network."""


@dataclass(frozen=True)
class Footprint:
    """Memory of the activations of a micro batch on one rank, in bytes.

    Args:
        kept: bytes that the forward pass saves for the backward pass.
        working: additional bytes while the backward pass runs through one unit.
    """

    kept: float
    working: float


def activation_footprint(
    config: ModelConfig | ConvolutionalConfig,
    event_shape: tuple[int, ...],
    batch: int,
    activations: Activations,
    bf16: bool,
) -> Footprint:
    """Memory of activations in a forward and backward pass of ``batch`` images.

    It does not include the bf16 copies of weights that autocast makes for the forward pass.
    """
    network = 2 if bf16 else 4
    if isinstance(config, ConvolutionalConfig):
        inside, of_loss = autoencoder_activations(config, event_shape)
        in_flight = 2.0 * network * config.width * math.prod(event_shape[1:])
        return Footprint(batch * (network * inside + 4 * of_loss), batch * in_flight)
    footprint = _of_flow(config, event_shape, batch, activations, network)
    noise = config.dequantization
    if noise is None:
        return footprint
    channels, rows, columns = event_shape
    coupling = batch * rows * columns * (4.0 * network * noise.width + 28.0 * channels)
    return Footprint(footprint.kept + noise.couplings * coupling, max(footprint.working, coupling / 4))


def _of_flow(
    config: ModelConfig, shape: tuple[int, ...], batch: int, activations: Activations, network: int
) -> Footprint:
    match config:
        case TarFlowConfig():
            return _tarflow(config, shape, batch, activations, network)
        case GlowConfig():
            return _glow(config, shape, batch, activations, network)
        case RealNVPConfig() if len(shape) == 1:
            unit = batch * network * config.width * (2.0 * config.residual_blocks + 1)
            maps = batch * 4.0 * (COUPLINGS * config.levels + 5) * shape[0]
            return _units([unit] * COUPLINGS * config.levels, maps, activations, 2.0 * batch * network * config.width)
        case RealNVPConfig():
            return _realnvp(config, shape, batch, activations, network)
        case NICEConfig():
            unit = batch * float(network) * config.width * config.hidden_layers
            maps = batch * 4.0 * (config.couplings / 2 + 1.5) * math.prod(shape)
            return _units([unit] * config.couplings, maps, activations, 2.0 * batch * network * config.width)
        case MAFConfig() | IAFConfig():
            dims = math.prod(shape)
            passes = 1 if config.kind == "maf" else dims + 1
            inputs = dims + config.label_width * config.class_conditional
            masked = 2.0 * linear_flops([inputs, *config.hidden_widths, 2 * dims])  # 4 bytes per weight
            unit = passes * (masked + batch * 4.0 * (sum(config.hidden_widths) + 4.3 * dims))
            maps = batch * 4.0 * config.transforms * dims
            return _units([unit] * config.transforms, 0.0 if activations == "keep" else maps, activations, masked)
        case ContinuousConfig():
            places = math.prod(shape[1:])
            evaluation = 24.0 * batch * places * config.width * config.hidden_layers
            steps = config.num_steps if config.solver in ("rk4", "midpoint") else 5
            kept = 0.0 if config.gradients == "adjoint" else steps * STAGES[config.solver] * evaluation
            return Footprint(kept, evaluation)


def _units(units: list[float], maps: float, activations: Activations, in_flight: float) -> Footprint:
    """Memory of a chain of units and of the tensors passed between them.

    If activations are not kept, only the largest unit counts, besides those tensors.
    """
    if activations == "keep":
        return Footprint(sum(units) + maps, in_flight)
    return Footprint(maps, max(units) + in_flight)


def _tarflow(
    config: TarFlowConfig, shape: tuple[int, ...], batch: int, activations: Activations, network: int
) -> Footprint:
    channels, height, width = shape
    tokens = float(batch * (height // config.patch_size) * (width // config.patch_size))
    features, preserving = channels * config.patch_size**2, config.variant == "volume_preserving"
    affine = 4.0 * (1 if preserving else 3 if config.log_scale_bound is None else 4)
    affine += (4 if preserving else 8) * (config.output_bound is not None) + 13 * (config.scale == "softplus")
    per_channel = _bytes_of_layer(config, network)
    kept, largest = 0.0, 0.0
    for layers, block_width in zip(config.layers_per_block, config.block_widths, strict=True):
        layer = tokens * block_width * (per_channel if activations == "keep" else 4.0)
        norm = 8.0 * config.final_norm
        kept += layers * layer + tokens * (
            (network + norm) * block_width + features * (affine + (2 if network == 2 else 0))
        )
        largest = max(largest, tokens * block_width)
    in_flight = 6.0 * network * largest
    return Footprint(kept, in_flight if activations == "keep" else largest * per_channel + in_flight)


def _bytes_of_layer(config: TarFlowConfig, network: int) -> float:
    """Bytes per token and channel that autograd keeps of a transformer layer."""
    groups, per_channel = config.queries_per_key, 8.0 + 14.0 * network
    if config.norm == "rms":
        per_channel += 8.0  # PyTorch keeps the normalized input too
    if config.mlp == "gated":
        per_channel += 8.0 * network
    if config.qk_norm:
        per_channel += 10.0 * (1 + 1 / groups)
    elif config.positions == "rotary":
        return per_channel + network * (3 if groups == 1 else 1)
    return per_channel + (0.0 if groups == 1 else 2.0 * network / groups)


def _glow(config: GlowConfig, shape: tuple[int, ...], batch: int, activations: Activations, network: int) -> Footprint:
    channels, height, width = shape
    image = 4.0 * batch * math.prod(shape)  # latents and their priors save several tensors of this size
    kept, maps, anchors, largest = 4 * image, 4 * image, (0.7 + 0.8 * config.levels) * image, 0.0
    around = _AROUND_COUPLING[config.coupling, network]
    for level in range(config.levels):
        c, pixels = channels * 2 ** (level + 2), batch * (height >> (level + 1)) * (width >> (level + 1))
        step = pixels * (4.0 * network * config.width + around * c) + (
            32.0 * c * c if config.convolution == "lu" else 0.0
        )
        kept += config.steps_per_level * step
        maps += config.steps_per_level * 4.0 * pixels * c
        anchors += math.ceil(config.steps_per_level / ANCHOR_EVERY) * 4.0 * pixels * c
        largest = max(largest, step + 2.0 * network * pixels * config.width)
    if activations == "keep":
        return Footprint(kept, largest / 3)
    return Footprint(maps if activations == "checkpoint" else anchors, largest)


def _realnvp(
    config: RealNVPConfig, shape: tuple[int, ...], batch: int, activations: Activations, network: int
) -> Footprint:
    units, maps, in_flight = list[float](), 1.5 * 4.0 * batch * math.prod(shape), 0.0
    for pixels, channels, width in realnvp_couplings(config, shape):
        units.append(batch * pixels * (network * width * (4.0 * config.residual_blocks + 2) + 40.0 * channels))
        maps += 0.0 if activations == "keep" else 4.0 * batch * pixels * channels
        in_flight = max(in_flight, 2.0 * network * batch * pixels * width)
    return _units(units, maps, activations, in_flight)
