"""The transformer of a TarFlow block for decoding: it predicts log-scale and mean of tokens from earlier tokens.

Shapes: B batch, R rows (B, or 2 B with guidance), c tokens of a call, T tokens of an image, P positions of the
cache (T, or T + 1 with a prefix token), D features, C width, K key heads, H head width, L layers.
"""

import functools
import zlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tarflow_scale.flows.attention import TransformerLayer, normalized
from tarflow_scale.flows.conditions import Condition
from tarflow_scale.flows.tarflow import TarFlowBlock
from tarflow_scale.sampling.windows import FixedWindow, OneQuery, Window, WindowOfTokens

__all__ = ["BlockNetwork"]

_BUCKET = 128
"""Number of token positions that share a CUDA graph. The graph reads the cache up to the last of these positions."""
_LANES = 509


class _Linear:
    """A linear layer. For input with one token per row on a CPU, it packs its weights for oneDNN.

    A product with few rows is limited by the time to read the weights, and is 1.5 to 2 times faster with packed weights
    (evals/benchmarks/sampling.py). For frozen weights, PyTorch's compiler uses the same oneDNN operators.
    """

    def __init__(self, module: torch.nn.Linear, dtype: torch.dtype) -> None:
        own = module.weight.detach(), module.bias.detach()
        self.weight, self.bias = (tensor.to(dtype) for tensor in own)
        packs = module.weight.device.type == "cpu" and _can_pack(dtype)
        self.copied = [tensor for tensor in own if tensor.dtype != dtype or (packs and tensor.ndim == 2)]
        """Tensors of the module that are cast or packed here; the copies must be updated when these tensors change."""
        self._packed: tuple[int, Tensor] | None = None

    def cast_again(self) -> None:
        """Cast the weights again, in the memory of their copies, because captured CUDA graphs read this memory."""
        for copy, own in zip((self.weight, self.bias), self.copied, strict=False):
            copy.copy_(own)

    def __call__(self, x: Tensor, gelu: bool = False, add: Tensor | None = None) -> Tensor:
        """Map ``x (..., in)`` to ``(..., out)``, then apply an exact GELU or add ``add``.

        Packed weights are used for rows of one token, ``(R, in)``.
        """
        if x.dim() == 2 and x.device.type == "cpu" and _can_pack(x.dtype):
            if add is not None:
                return torch.ops.mkldnn._linear_pointwise.binary(x, add, self._pack(len(x)), self.bias, "add")
            activation = ("gelu", [], "none") if gelu else ("none", [], "")
            return torch.ops.mkldnn._linear_pointwise(x, self._pack(len(x)), self.bias, *activation)
        y = F.linear(x, self.weight, self.bias)
        y = F.gelu(y) if gelu else y
        return y if add is None else add + y

    def _pack(self, rows: int) -> Tensor:
        if self._packed is None or self._packed[0] != rows:
            self._packed = rows, torch.ops.mkldnn._reorder_linear_weight(self.weight, rows)
        return self._packed[1]


class _Layer:
    """The weights of a transformer layer; norms keep their precision."""

    def __init__(self, layer: TransformerLayer, dtype: torch.dtype) -> None:
        self._layer = layer
        self.qkv, self.attention_out = _Linear(layer.qkv, dtype), _Linear(layer.attention_out, dtype)
        self.mlp_in, self.mlp_out = _Linear(layer.mlp_in, dtype), _Linear(layer.mlp_out, dtype)

    def __call__(
        self, h: Tensor, window: Window, cache: Tensor, sharpness: Tensor | None, turn: Tensor | None
    ) -> Tensor:
        """Map ``h (R, c, C)``; see `Window.attend` for the other arguments."""
        attended = window.attend(self._qkv(h), cache, sharpness, turn)
        h = self.attention_out(attended, add=h)
        normed = _normed(h, self._layer.mlp_norm)
        if not self._layer.gated:
            return self.mlp_out(self.mlp_in(normed, gelu=True), add=h)
        gate, value = self.mlp_in(normed).chunk(2, dim=-1)
        return self.mlp_out(F.gelu(gate, approximate="tanh") * value, add=h)

    def _qkv(self, h: Tensor) -> Tensor:
        layer = self._layer
        qkv = self.qkv(_normed(h, layer.attention_norm))
        if layer.query_norm is None or layer.key_norm is None:
            return qkv
        width = layer.head_width
        sizes = [layer.num_heads * width, layer.num_key_heads * width, layer.num_key_heads * width]
        q, k, v = qkv.split(sizes, dim=-1)
        q = _normed(q.unflatten(-1, (-1, width)), layer.query_norm).flatten(-2)
        k = _normed(k.unflatten(-1, (-1, width)), layer.key_norm).flatten(-2)
        return torch.cat([q, k, v], dim=-1)


@functools.cache
def _can_pack(dtype: torch.dtype) -> bool:
    operators = ("_linear_pointwise", "_reorder_linear_weight")
    if not torch.backends.mkldnn.is_available() or not all(hasattr(torch.ops.mkldnn, name) for name in operators):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class BlockNetwork:
    """One block of a TarFlow, prepared for decoding.

    Args:
        block: the block; weights that already have the precision ``dtype`` are shared, others are cast once.
        dtype: precision of matrix products and of the cache; see `cache_dtype`.
    """

    def __init__(self, block: TarFlowBlock, dtype: torch.dtype) -> None:
        self.block = block
        self.dtype = dtype
        self._proj_in, self._proj_out = _Linear(block.proj_in, dtype), _Linear(block.proj_out, dtype)
        self._layers = [_Layer(layer, dtype) for layer in block.layers]  # type: ignore[arg-type]
        self._linears = [self._proj_in, self._proj_out]
        for layer in self._layers:
            self._linears += [layer.qkv, layer.attention_out, layer.mlp_in, layer.mlp_out]
        self._turn = block.turn(self._proj_in.weight)
        self._graphs: dict[tuple[int, ...], _Graph] = {}
        self._on_cpu = self._proj_in.weight.device.type == "cpu"

    def checksums(self) -> list[int]:
        """Checksums, on a CPU, of the block's weights that are cast or packed here; this takes 0.4 ms for 4 MB.

        Only a checksum can detect a write to ``parameter.data``.
        """
        return [_checksum(tensor) for linear in self._linears for tensor in linear.copied]

    def cast_again(self) -> None:
        """Update all copies on a GPU, where weights are never packed and copying is cheaper than comparing."""
        for linear in self._linears:
            linear.cast_again()

    @property
    def cache_dtype(self) -> torch.dtype:
        """Precision of keys and values: ``dtype``, but at least fp32 on a CPU if `OneQuery` is not compiled.

        PyTorch's attention, which is then used, is slower for a single query in bf16 than in fp32, although bf16
        products are faster.
        """
        if not self._on_cpu or OneQuery.function(self.block.config.head_width, self.dtype) is not None:
            return self.dtype
        return torch.promote_types(self.dtype, torch.float32)

    def cache_shape(self, rows: int) -> tuple[int, ...]:
        """Shape ``(L, 2, R, K, P, H)`` of the cache of keys and values."""
        layer = self.block.layers[0]
        assert isinstance(layer, TransformerLayer)
        positions = self.block.num_tokens + self.block.has_prefix
        return len(self.block.layers), 2, rows, layer.num_key_heads, positions, layer.head_width

    def new_cache(self, rows: int) -> Tensor:
        """Allocate the cache, with zeros; see `cache_shape`."""
        return self._proj_in.weight.new_zeros(self.cache_shape(rows), dtype=self.cache_dtype)

    def offsets(self, y: Condition, batch: int) -> Tensor:
        """Sum of the position and condition embeddings of every token, ``(B, T, C)`` in reading order."""
        return self.block.offsets(y).detach().to(self.dtype).expand(batch, -1, -1)

    def read_prefix(self, prefix: Tensor, cache: Tensor, sharpness: Tensor | None = None) -> None:
        """Write the keys and values of the prefix token ``(R, 1, C)`` to the cache."""
        self._layers_of(prefix.detach().to(self.dtype), cache, WindowOfTokens(0, 1), sharpness)

    def parameters(
        self, tokens: Tensor, offsets: Tensor, cache: Tensor, start: int, sharpness: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor]:
        """For each token, predict the log-scale and the mean of the next token, both ``(R, c, D)`` in fp32 or wider.

        The log-scale is None if the block preserves volume. R is B, or 2 B with guidance, whose two predictions use the
        same tokens.

        Args:
            tokens: ``(B, c, D)``, the tokens at positions ``start``, ``start + 1``, ... in reading order.
            offsets: ``(R, c, C)``, the result of the method `offsets` for these positions.
            cache: see `cache_shape`; positions before ``start`` are read, the positions of ``tokens`` are written.
            start: position of the first token, where the start token has position 0 and the prefix is not counted.
            sharpness: factor on the attention logits of each row, ``(R, 1, 1, 1)``.
        """
        tokens, count, start = tokens.to(self.dtype), tokens.shape[1], start + self.block.has_prefix
        if count == 1 and tokens.is_cuda:
            out = self._replayed(tokens, offsets, cache, start, sharpness)
        elif count == 1 and self._on_cpu:
            out = self.outputs(tokens[:, 0], offsets[:, 0], cache, OneQuery(start), sharpness)[:, None]
        else:
            out = self.outputs(tokens, offsets, cache, WindowOfTokens(start, start + count), sharpness)
        return self.block.parameters_of(out if out.dtype == torch.float64 else out.float())

    def outputs(
        self, tokens: Tensor, offsets: Tensor, cache: Tensor, window: Window, sharpness: Tensor | None = None
    ) -> Tensor:
        """Output of the block's last layer, ``(R, c, D or 2 D)``; without the axis c for `OneQuery`."""
        h = self._proj_in(tokens)
        h = self._layers_of((offsets.view(-1, *h.shape) + h).view(offsets.shape), cache, window, sharpness)
        norm = self.block.final_norm
        return self._proj_out(h if norm is None else _normed(h, norm))

    def _layers_of(self, h: Tensor, cache: Tensor, window: Window, sharpness: Tensor | None) -> Tensor:
        for layer, layer_cache in zip(self._layers, cache, strict=True):
            h = layer(h, window, layer_cache, sharpness, self._turn)
        return h

    def fixed(self, start: int, num_tokens: int, device: torch.device) -> FixedWindow:
        """The window of one token at ``start``; its shapes are the same for all positions of a bucket."""
        length = min((start // _BUCKET + 1) * _BUCKET, num_tokens)
        return FixedWindow(torch.full((1,), start, dtype=torch.int64, device=device), length)

    def _replayed(self, tokens: Tensor, offsets: Tensor, cache: Tensor, start: int, sharpness: Tensor | None) -> Tensor:
        """`outputs` of one token from a CUDA graph, which is captured at the first token of a bucket."""
        window = self.fixed(start, cache.shape[4], tokens.device)
        key = (window.length, cache.data_ptr(), *offsets.shape, 0 if sharpness is None else 1)
        if key not in self._graphs:
            self._graphs = {k: graph for k, graph in self._graphs.items() if k[1] == cache.data_ptr()}
            self._graphs[key] = _Graph(self, tokens, offsets, cache, window, sharpness)
        return self._graphs[key].replay(tokens, offsets, start, sharpness)


class _Graph:
    """A CUDA graph of `BlockNetwork.outputs` for one token, with buffers for its input."""

    def __init__(
        self,
        network: BlockNetwork,
        tokens: Tensor,
        offsets: Tensor,
        cache: Tensor,
        window: FixedWindow,
        sharpness: Tensor | None,
    ) -> None:
        self._tokens, self._offsets, self._position = tokens.clone(), offsets.clone(), window.position
        self._sharpness = None if sharpness is None else sharpness.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries must allocate their workspaces before the capture
            network.outputs(self._tokens, self._offsets, cache, window, self._sharpness)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._out = network.outputs(self._tokens, self._offsets, cache, window, self._sharpness)

    def replay(self, tokens: Tensor, offsets: Tensor, start: int, sharpness: Tensor | None) -> Tensor:
        """The output for a token at ``start``. The next replay overwrites it."""
        self._tokens.copy_(tokens)
        self._offsets.copy_(offsets)
        self._position.fill_(start)
        if self._sharpness is not None and sharpness is not None:
            self._sharpness.copy_(sharpness)
        self._graph.replay()
        return self._out


def _checksum(tensor: Tensor) -> int:
    """Checksum of the bytes of a tensor on a CPU: CRC-32 of sums of words, 2.5 times faster than CRC-32 of all words.

    There are `_LANES` sums modulo 2^64; sum i adds every `_LANES`-th word from word i on. A change of one word changes
    a sum, and so does an exchange of rows or columns, because the prime `_LANES` does not divide any layer size.
    """
    content = tensor.contiguous().view(torch.uint8).numpy().reshape(-1)
    summed = content[: content.size // (8 * _LANES) * 8 * _LANES]
    sums = np.add.reduce(summed.view(np.uint64).reshape(-1, _LANES), axis=0)
    return zlib.crc32(content[summed.size :].tobytes(), zlib.crc32(sums.tobytes()))


def _normed(h: Tensor, norm: nn.Module) -> Tensor:
    """Apply a norm in the precision of its weights; the result has the precision of ``h``.

    On a GPU the input is cast first; for a LayerNorm on a CPU this is not needed, because the operator accepts lower
    precision.
    """
    if isinstance(norm, nn.LayerNorm) and h.device.type == "cpu":
        return F.layer_norm(h, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    return normalized(norm, h)
