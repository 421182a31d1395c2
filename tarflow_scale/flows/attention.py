"""The causal transformer layer of a TarFlow block, and the key/value cache that callers pass to it.

Shapes: B batch, T tokens, C width, N heads, H = C / N head width, K key heads, F = H / 2.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from tarflow_scale.config.model import TarFlowConfig
from tarflow_scale.flows.conditions import is_transformed
from tarflow_scale.flows.rotary import rotate

__all__ = ["RMS_EPS", "KeyValueCache", "RMSNorm", "TransformerLayer", "normalized"]

RMS_EPS = 1e-6
"""Added to the mean square in an `RMSNorm`, as in STARFlow."""


class KeyValueCache:
    """Preallocated keys and values ``(layers, B, K, T, H)`` of one block, filled one token at a time."""

    def __init__(self, num_layers: int, batch: int, heads: int, tokens: int, head_width: int, like: Tensor) -> None:
        shape = (num_layers, batch, heads, tokens, head_width)
        self.keys = like.new_zeros(shape)
        self.values = like.new_zeros(shape)
        self.length = 0
        """Number of tokens already in the cache; the block increments it after its last layer."""
        self._grown: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store a token's key and value ``(B, K, 1, H)``; return all keys and values so far, both ``(B, K, t, H)``."""
        if k.requires_grad or is_transformed():  # autograd needs the old values, so this copies
            if layer in self._grown:
                earlier_k, earlier_v = self._grown[layer]
                k, v = torch.cat([earlier_k, k], dim=2), torch.cat([earlier_v, v], dim=2)
            self._grown[layer] = k, v
            return k, v
        self.keys[layer, :, :, self.length] = k[:, :, 0]
        self.values[layer, :, :, self.length] = v[:, :, 0]
        stop = self.length + 1
        return self.keys[layer, :, :, :stop], self.values[layer, :, :, :stop]


class RMSNorm(nn.Module):
    """Division by the root mean square, then multiplication by learned weights, in fp32 (arXiv 1910.07467)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        """Normalize the last axis; the result has the precision of ``x``."""
        return normalized(self, x)


def normalized(norm: nn.Module, x: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
    """Apply a LayerNorm or an `RMSNorm` in fp32 or wider; the result has the precision of ``x``."""
    with torch.autocast(x.device.type, enabled=False):
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        if isinstance(norm, nn.LayerNorm):
            weight, bias = norm.weight.to(wide), norm.bias.to(wide)
            return F.layer_norm(wide, norm.normalized_shape, weight, bias, norm.eps).to(x)
        assert isinstance(norm, RMSNorm)
        return F.rms_norm(wide, norm.weight.shape, norm.weight.to(wide), RMS_EPS).to(x)


class TransformerLayer(nn.Module):
    """Pre-norm attention and MLP, as in arXiv 2412.06329 if the options of ``config`` have their defaults.

    Dropout, in training, drops a feature of a residual branch for all tokens of a sample together (Gal and Ghahramani,
    arXiv 1512.05287), which needs T times fewer random numbers. With G = ``queries_per_key``, the linear layer ``qkv``
    computes N query heads, N / G key heads and N / G value heads. In a gated MLP, ``mlp_in`` computes the gate and the
    value.

    Args:
        config: the section ``model``.
        width: number of features C of a token, a multiple of ``head_width``.
    """

    def __init__(self, config: TarFlowConfig, width: int) -> None:
        super().__init__()
        self.head_width, self.gated = config.head_width, config.mlp == "gated"
        self.num_heads = width // config.head_width
        self.num_key_heads = self.num_heads // config.queries_per_key
        norm = nn.LayerNorm if config.norm == "layer" else RMSNorm
        self.attention_norm = norm(width)
        self.qkv = nn.Linear(width, (self.num_heads + 2 * self.num_key_heads) * config.head_width)
        self.query_norm = RMSNorm(config.head_width) if config.qk_norm else None
        self.key_norm = RMSNorm(config.head_width) if config.qk_norm else None
        self.attention_out = nn.Linear(width, width)
        self.mlp_norm = norm(width)
        self.mlp_in = nn.Linear(width, (8 if self.gated else 4) * width)
        self.mlp_out = nn.Linear(4 * width, width)
        self.dropout = config.dropout

    def forward(
        self, h: Float[Tensor, "B T C"], turn: Float[Tensor, "2 T F"] | None = None, twice: bool = False
    ) -> Float[Tensor, "B T C"]:
        """Map all tokens; token t attends to tokens <= t. With ``twice``, all operations have second derivatives.

        ``turn`` is the `rotation` of the positions, or None.
        """
        q, k, v = self._heads(h, turn)
        k, v = self._repeated(k), self._repeated(v)
        attended = _attended(q, k, v) if twice else F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self._dropped(self._merge(attended))
        return h + self._dropped(self._mlp(h))

    def step(
        self,
        h: Float[Tensor, "B 1 C"],
        cache: KeyValueCache,
        layer: int,
        sharpness: Tensor | None = None,
        turn: Float[Tensor, "2 1 F"] | None = None,
    ) -> Float[Tensor, "B 1 C"]:
        """Map only the next token, which attends to the cached tokens and to itself.

        Args:
            h: features of the token.
            cache: keys and values of earlier tokens; the key and value of this token are added.
            layer: index of this layer in the cache.
            sharpness: factor on the attention logits of each sample, ``(B, 1, 1, 1)``; None for 1.
            turn: `rotation` of the position of the token, or None.
        """
        q, k, v = self._heads(h, turn)
        q = q if sharpness is None else q * sharpness
        k, v = map(self._repeated, cache.extend(layer, k, v))
        h = h + self._merge(_attended(q, k, v) if is_transformed() else F.scaled_dot_product_attention(q, k, v))
        return h + self._mlp(h)

    def _heads(self, h: Tensor, turn: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.qkv(normalized(self.attention_norm, h)).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
        q, k, v = heads.split([self.num_heads, self.num_key_heads, self.num_key_heads], dim=1)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        return rotate(q, turn), rotate(k, turn), v

    def _repeated(self, heads: Tensor) -> Tensor:
        """Key or value heads, each repeated for the queries that share it."""
        groups = self.num_heads // self.num_key_heads
        return heads if groups == 1 else heads.repeat_interleave(groups, dim=1)

    def _merge(self, heads: Tensor) -> Tensor:
        return self.attention_out(rearrange(heads, "b n t h -> b t (n h)"))

    def _mlp(self, h: Tensor) -> Tensor:
        hidden = self.mlp_in(normalized(self.mlp_norm, h))
        if self.gated:
            gate, value = hidden.chunk(2, dim=-1)
            return self.mlp_out(F.gelu(gate, approximate="tanh") * value)
        return self.mlp_out(F.gelu(hidden))

    def _dropped(self, branch: Tensor) -> Tensor:
        if not self.training or self.dropout == 0:
            return branch
        return branch * F.dropout(branch.new_ones(len(branch), 1, branch.shape[2]), self.dropout)


def _attended(
    q: Float[Tensor, "B N t H"], k: Float[Tensor, "B N T H"], v: Float[Tensor, "B N T H"]
) -> Float[Tensor, "B N t H"]:
    """Causal attention of the last t tokens in basic operations; PyTorch's fused kernels have no second derivatives."""
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1 + k.shape[-2] - q.shape[-2])
    return torch.softmax(scores.masked_fill(later, -math.inf), dim=-1) @ v
