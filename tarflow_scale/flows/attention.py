"""The causal pre-LayerNorm transformer layer of a TarFlow block, and the key/value cache that callers pass to it.

Shapes: B batch, T tokens, C width, N heads, H = C / N head width.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from tarflow_scale.flows.conditions import is_transformed

__all__ = ["KeyValueCache", "TransformerLayer"]


class KeyValueCache:
    """Preallocated keys and values ``(layers, B, N, T, H)`` of one block, filled one token at a time."""

    def __init__(self, num_layers: int, batch: int, heads: int, tokens: int, head_width: int, like: Tensor) -> None:
        shape = (num_layers, batch, heads, tokens, head_width)
        self.keys = like.new_zeros(shape)
        self.values = like.new_zeros(shape)
        self.length = 0
        """Number of tokens already in the cache; the block increments it after its last layer."""
        self._grown: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store a token's key and value ``(B, N, 1, H)``; return all keys and values so far, both ``(B, N, t, H)``."""
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


class TransformerLayer(nn.Module):
    """Pre-LayerNorm attention and MLP with exact GELU, as in arXiv 2412.06329; LayerNorm is kept in fp32.

    Args:
        width: number of features C of a token, a multiple of ``head_width``.
        head_width: width H of one attention head.
        dropout: probability that training drops a feature of a residual branch. A feature is dropped for all tokens of
            a sample together (Gal and Ghahramani, arXiv 1512.05287), which needs T times fewer random numbers.
    """

    def __init__(self, width: int, head_width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads = width // head_width
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)
        self.dropout = dropout

    def forward(self, h: Float[Tensor, "B T C"], twice: bool = False) -> Float[Tensor, "B T C"]:
        """Map all tokens; token t attends to tokens <= t. With ``twice``, all operations have second derivatives."""
        q, k, v = self._heads(h)
        attended = _attended(q, k, v) if twice else F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self._dropped(self._merge(attended))
        return h + self._dropped(self._mlp(h))

    def step(
        self, h: Float[Tensor, "B 1 C"], cache: KeyValueCache, layer: int, sharpness: Tensor | None = None
    ) -> Float[Tensor, "B 1 C"]:
        """Map only the next token, which attends to the cached tokens and to itself.

        Args:
            h: features of the token.
            cache: keys and values of earlier tokens; the key and value of this token are added.
            layer: index of this layer in the cache.
            sharpness: factor on the attention logits of each sample, ``(B, 1, 1, 1)``; None for 1.
        """
        q, k, v = self._heads(h)
        q = q if sharpness is None else q * sharpness
        k, v = cache.extend(layer, k, v)
        h = h + self._merge(_attended(q, k, v) if is_transformed() else F.scaled_dot_product_attention(q, k, v))
        return h + self._mlp(h)

    def _heads(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.qkv(self._norm(self.attention_norm, h))
        q, k, v = rearrange(qkv, "b t (three n h) -> three b n t h", three=3, n=self.num_heads)
        return q, k, v

    def _merge(self, heads: Tensor) -> Tensor:
        return self.attention_out(rearrange(heads, "b n t h -> b t (n h)"))

    def _mlp(self, h: Tensor) -> Tensor:
        return self.mlp_out(F.gelu(self.mlp_in(self._norm(self.mlp_norm, h))))

    def _dropped(self, branch: Tensor) -> Tensor:
        if not self.training or self.dropout == 0:
            return branch
        return branch * F.dropout(branch.new_ones(len(branch), 1, branch.shape[2]), self.dropout)

    @staticmethod
    def _norm(norm: nn.LayerNorm, h: Tensor) -> Tensor:
        with torch.autocast(h.device.type, enabled=False):
            wide = h.float() if h.dtype in (torch.bfloat16, torch.float16) else h
            return F.layer_norm(wide, norm.normalized_shape, norm.weight.to(wide), norm.bias.to(wide), norm.eps).to(h)


def _attended(
    q: Float[Tensor, "B N t H"], k: Float[Tensor, "B N T H"], v: Float[Tensor, "B N T H"]
) -> Float[Tensor, "B N t H"]:
    """Causal attention of the last t tokens in basic operations; PyTorch's fused kernels have no second derivatives."""
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1 + k.shape[-2] - q.shape[-2])
    return torch.softmax(scores.masked_fill(later, -math.inf), dim=-1) @ v
