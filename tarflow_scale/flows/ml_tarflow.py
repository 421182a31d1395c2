"""Convert weights of apple/ml-tarflow, a ``.pth`` state dict, to a `TarFlow`. All sizes are read from the tensors.

The tensors of the public model (block b, layer l, N tokens, D features, C width, K classes):

    var (N, D)                                          prior variance; all ones in an affine model
    blocks.b.{pos_embed (N, C), class_embed (K, 1, C), attn_mask (N, N), proj_in, proj_out}
    blocks.b.attn_blocks.l.{attention.{norm, qkv, proj}, mlp.{norm, main.0, main.2}}

``proj_out`` of an affine model has 2 D rows, log-scales before means. ``proj_out`` of a volume-preserving model has D
rows, and ``var`` becomes our ``log_std``. Attention heads are 64 wide. The public loss of a volume-preserving model,
0.5 mean(z^2), leaves out the logarithm of the scale, which is in ``var``. `Flow.log_prob` includes it (sum log_std) and
so, unlike the public loss, is a log density.

The file is read with ``weights_only``, which refuses files that would run code.
"""

import math
import re
from typing import Any, Literal

import torch
from torch import Tensor

from tarflow_scale import storage
from tarflow_scale.config.model import TarFlowConfig
from tarflow_scale.errors import ConfigError, DataError
from tarflow_scale.flows.build import build
from tarflow_scale.flows.flow import Flow
from tarflow_scale.flows.weights import check_finite, read_plain_weights

__all__ = ["flow_from_ml_tarflow", "load_ml_tarflow"]

HEAD_WIDTH = 64
"""Width of an attention head, which is fixed in the public code."""
_BLOCK_NAMES = {"pos_embed": "position", "class_embed": "class_embedding"}
_LAYER_NAMES = {
    "attention.norm": "attention_norm",
    "attention.qkv": "qkv",
    "attention.proj": "attention_out",
    "mlp.norm": "mlp_norm",
    "mlp.main.0": "mlp_in",
    "mlp.main.2": "mlp_out",
}
_LAYER = re.compile(r"attn_blocks\.(\d+)\.(.+)\.(weight|bias)")


def load_ml_tarflow(path: str, num_channels: int | None = None) -> Flow:
    """Read a state dict that apple/ml-tarflow saved, into a `TarFlow` in evaluation mode on the CPU.

    Args:
        path: path or URL of the ``.pth`` file.
        num_channels: number of channels of the images; None infers 1 or 3, which is unambiguous.

    Raises:
        DataError: the file does not exist, is not a state dict of a TarFlow, or would run code.
    """
    if not storage.exists(path):
        raise DataError(f"the file {path} does not exist; check the path of the weights")
    with storage.local_copy(path) as copy:
        return flow_from_ml_tarflow(read_plain_weights(copy, path), path, num_channels)


def flow_from_ml_tarflow(state: Any, origin: str, num_channels: int | None = None) -> Flow:
    """Build a `TarFlow` with the weights of a public state dict; see `load_ml_tarflow`.

    Raises:
        DataError: the state dict does not belong to a TarFlow.
    """
    named = isinstance(state, dict) and all(isinstance(k, str) and torch.is_tensor(v) for k, v in state.items())
    if not named or not state:
        raise DataError(
            f"{origin} must hold a dictionary of tensors by name (got {type(state).__name__}); pass the file of the "
            f"model, not the file of the optimizer"
        )
    tensors: dict[str, Tensor] = state
    try:
        config, event_shape, num_classes = _configuration(tensors, num_channels)
        with torch.device("meta"):
            flow = build(config, event_shape, num_classes)
        flow.load_state_dict(_renamed(tensors, config.variant), assign=True)
        check_finite(flow)
    except (ValueError, ConfigError, RuntimeError, KeyError) as error:
        reason = f"no {error.args[0]}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise DataError(
            f"{origin} is not an ml-tarflow model ({reason}); pass a file that train.py of ml-tarflow saved"
        ) from error
    return flow.eval()


def _configuration(
    tensors: dict[str, Tensor], num_channels: int | None
) -> tuple[TarFlowConfig, tuple[int, int, int], int | None]:
    """The configuration, event shape and number of classes that the tensors imply."""
    num_tokens, features = _shape(tensors, "var", 2)
    width = _shape(tensors, "blocks.0.pos_embed", 2)[1]
    if width % HEAD_WIDTH:
        raise ValueError(f"the width must be a multiple of {HEAD_WIDTH}, got {width}")
    rows = _shape(tensors, "blocks.0.proj_out.weight", 2)[0]
    if rows not in (features, 2 * features):
        raise ValueError(f"proj_out must have {features} or {2 * features} rows, got {rows}")
    variant: Literal["affine", "volume_preserving"] = "affine" if rows == 2 * features else "volume_preserving"
    channels, patch = _patch(features, num_channels)
    side = math.isqrt(num_tokens)
    if side * side != num_tokens:
        raise ValueError(f"the number of tokens must be a square, got {num_tokens}")
    embedding = tensors.get("blocks.0.class_embed")
    if embedding is not None and _shape(tensors, "blocks.0.class_embed", 3)[1:] != (1, width):
        raise ValueError(f"class_embed must be (classes, 1, {width}), got {tuple(embedding.shape)}")
    config = TarFlowConfig(
        kind="tarflow",
        patch_size=patch,
        width=width,
        head_width=HEAD_WIDTH,
        layers_per_block=_depths(tensors),
        variant=variant,
        class_conditional=embedding is not None,
    )
    return config, (channels, side * patch, side * patch), None if embedding is None else len(embedding)


def _shape(tensors: dict[str, Tensor], name: str, axes: int) -> tuple[int, ...]:
    if tensors[name].ndim != axes or tensors[name].numel() == 0:
        raise ValueError(f"{name} must have {axes} axes and not be empty, got {tuple(tensors[name].shape)}")
    return tuple(tensors[name].shape)


def _patch(features: int, num_channels: int | None) -> tuple[int, int]:
    """Number of channels, and patch size. The features fit a square patch of 1 or of 3 channels, but never both."""
    for channels in (1, 3) if num_channels is None else (num_channels,):
        patch = math.isqrt(features // channels)
        if patch and channels * patch * patch == features:
            return channels, patch
    raise ValueError(
        f"a token must be a square patch with {num_channels or '1 or 3'} channels, got {features} features"
    )


def _depths(tensors: dict[str, Tensor]) -> tuple[int, ...]:
    """Number of layers of each block. A gap in numbering raises ValueError, so no name can imply a million layers."""
    layers: dict[int, set[int]] = {}
    for name in tensors:
        match = re.match(r"blocks\.(\d{1,9})\.attn_blocks\.(\d{1,9})\.", name)
        if match:
            layers.setdefault(int(match[1]), set()).add(int(match[2]))
    for noun, numbers in (("blocks", set(layers)), *((f"layers of block {b}", layers[b]) for b in sorted(layers))):
        if numbers != set(range(len(numbers))) or not numbers:
            raise ValueError(f"{noun} must be numbered from 0 without a gap, got {sorted(numbers)[:8]}")
    return tuple(len(layers[block]) for block in range(len(layers)))


def _renamed(tensors: dict[str, Tensor], variant: str) -> dict[str, Tensor]:
    ours: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.is_meta:
            raise ValueError(f"{name} must be dense floats, got {tensor.dtype} {tensor.layout}")
        value = tensor.float()
        if name == "var":
            if variant == "volume_preserving":
                ours["log_std"] = 0.5 * value.log()
            elif not bool((value == 1).all()):
                raise ValueError("var of an affine model must be all ones")
            continue
        prefix, _, rest = name.partition(".")
        block, _, rest = rest.partition(".")
        if prefix != "blocks":
            raise ValueError(f"unknown tensor {name}")
        if rest == "attn_mask":
            tokens = len(tensors["var"])
            if value.shape != (tokens, tokens) or not torch.equal(value, torch.ones_like(value).tril()):
                raise ValueError(f"{name} must be a causal mask")
            continue
        layer = _LAYER.fullmatch(rest)
        if layer is not None and layer[2] in _LAYER_NAMES:
            rest = f"layers.{layer[1]}.{_LAYER_NAMES[layer[2]]}.{layer[3]}"
        elif rest == "class_embed":
            if value.ndim != 3:
                raise ValueError(f"{name} must have 3 axes, got {tuple(value.shape)}")
            value = value.flatten(1)
        ours[f"blocks.{block}.{_BLOCK_NAMES.get(rest, rest)}"] = value
    return ours
