"""Attention of new tokens to themselves and to the cached keys and values of earlier tokens.

Shapes: R rows, c tokens of a call, T cached positions, N heads, K key heads, H head width, C = N H width,
E = (N + 2 K) H. The cache of a layer is ``(2, R, K, T, H)``: rotated keys, and values. Queries, keys and values of c
tokens are concatenated, ``(R, c, E)``; N / K query heads share a key head.
"""

import abc
import ctypes
import functools
import logging
import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from tarflow_scale.flows.rotary import rotate

__all__ = ["FixedWindow", "OneQuery", "Window", "WindowOfTokens"]

_log = logging.getLogger(__name__)


class Window(abc.ABC):
    """The positions of some tokens in the cache, and the positions to which they attend."""

    @abc.abstractmethod
    def attend(self, qkv: Tensor, cache: Tensor, sharpness: Tensor | None, turn: Tensor | None = None) -> Tensor:
        """Write keys and values to the cache; return the attention output ``(R, c, C)`` in the precision of ``qkv``.

        Args:
            qkv: queries, keys and values ``(R, c, E)``.
            cache: cache of the layer.
            sharpness: factor on the attention logits of each row, ``(R, 1, 1, 1)``.
            turn: cosines and sines ``(2, T, H / 2)`` by which the queries and keys of all positions are rotated; see
                `tarflow_scale.flows.rotary`.
        """


@dataclass(frozen=True)
class WindowOfTokens(Window):
    """Tokens at positions ``[start, stop)``; each attends to itself and all earlier tokens."""

    start: int
    stop: int

    def attend(self, qkv: Tensor, cache: Tensor, sharpness: Tensor | None, turn: Tensor | None = None) -> Tensor:
        """See `Window.attend`."""
        turn = None if turn is None else turn[:, self.start : self.stop]
        q, keys_values = _split(qkv, cache, sharpness, turn)
        cache[:, :, :, self.start : self.stop] = keys_values
        k, v = cache[0, :, :, : self.stop], cache[1, :, :, : self.stop]
        if self.stop - self.start == 1:
            return _attention(q, k, v, qkv)
        if self.start == 0:
            return _attention(q, k, v, qkv, is_causal=True)
        return _attention(q, k, v, qkv, attn_mask=causal_lower_right(q.shape[2], self.stop))


@dataclass(frozen=True)
class FixedWindow(Window):
    """One token whose position is a tensor, so that shapes do not depend on the position.

    position: ``(1,)`` int64. length: number of cached positions that attention reads; those after ``position`` are
    masked.
    """

    position: Tensor
    length: int

    def attend(self, qkv: Tensor, cache: Tensor, sharpness: Tensor | None, turn: Tensor | None = None) -> Tensor:
        """See `Window.attend`."""
        turn = None if turn is None else turn.index_select(1, self.position)
        q, keys_values = _split(qkv, cache, sharpness, turn)
        cache.index_copy_(3, self.position, keys_values)
        seen = torch.arange(self.length, device=q.device) <= self.position
        k, v = cache[0, :, :, : self.length], cache[1, :, :, : self.length]
        return _attention(q, k, v, qkv, attn_mask=seen.view(1, 1, 1, -1))


@dataclass(frozen=True)
class OneQuery(Window):
    """One token at ``position`` on a CPU; attention uses the C code in ``one_query.c`` if it can be compiled.

    PyTorch's attention is made for many queries. For one query on a CPU it reads the cache much slower than the memory
    allows, especially in bf16 (evals/benchmarks/one_query.py). ``qkv`` is ``(R, E)`` and the result ``(R, C)``.
    """

    position: int

    def attend(self, qkv: Tensor, cache: Tensor, sharpness: Tensor | None, turn: Tensor | None = None) -> Tensor:
        """See `Window.attend`."""
        _, rows, key_heads, capacity, head_width = cache.shape
        function = self.function(head_width, cache.dtype) if qkv.dtype == cache.dtype else None
        if function is None:  # also for fp16, and for bf16 heads of odd width, whose cache is fp32
            window = WindowOfTokens(self.position, self.position + 1)
            return window.attend(qkv[:, None], cache, sharpness, turn)[:, 0]
        if not (qkv.is_contiguous() and cache.is_contiguous()):
            raise ValueError(f"got strides {qkv.stride()} and {cache.stride()}")
        heads = qkv.shape[1] // head_width - 2 * key_heads
        out = qkv.new_empty(rows, heads * head_width)
        factors = None if sharpness is None else sharpness.float().contiguous()
        angles = None if turn is None else turn[:, self.position].float().contiguous()
        function(
            qkv.data_ptr(),
            cache[0].data_ptr(),
            cache[1].data_ptr(),
            out.data_ptr(),
            None if factors is None else factors.data_ptr(),
            None if angles is None else angles.data_ptr(),
            rows,
            heads,
            key_heads,
            capacity,
            self.position,
            torch.get_num_threads(),
        )
        return out

    @staticmethod
    @functools.cache
    def function(head_width: int, dtype: torch.dtype) -> Callable[..., None] | None:
        """Compiled ``one_query.c``; None for unsupported arguments, or if there is no C compiler (``$CC`` or cc)."""
        if dtype not in (torch.float32, torch.bfloat16) or head_width % (4 // dtype.itemsize):
            return None  # a bf16 head of odd width does not fill whole words
        source = Path(__file__).with_name("one_query.c")
        options = [f"-DHEAD_WIDTH={head_width}", f"-DNARROW={int(dtype == torch.bfloat16)}"]
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            library = Path(folder, "one_query.so")
            compiler = [*shlex.split(os.environ.get("CC") or "cc"), *_OPTIONS, *options]
            try:
                subprocess.run([*compiler, str(source), "-o", str(library), "-lm"], check=True, capture_output=True)
                function = ctypes.CDLL(str(library)).one_query
            except (OSError, subprocess.CalledProcessError) as error:
                output = getattr(error, "stderr", b"").decode(errors="replace")
                _log.warning(
                    "sampling on this CPU is slower than it could be: %s was not compiled (%s%s)",
                    source.name,
                    error,
                    output and f": {output.strip().splitlines()[0]}",
                )
                return None
        function.argtypes = [ctypes.c_void_p] * 6 + [ctypes.c_int64] * 6
        function.restype = None
        return function  # type: ignore[no-any-return]


_OPTIONS = ("-std=c11", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-shared", "-fPIC")
"""Compiler options, without -ffast-math: in a library, it makes the whole process flush subnormal numbers to zero."""


def _split(qkv: Tensor, cache: Tensor, sharpness: Tensor | None, turn: Tensor | None) -> tuple[Tensor, Tensor]:
    """Split ``qkv`` into queries ``(R, N, c, H)`` in the cache's precision, and keys and values ``(2, R, K, c, H)``."""
    heads = qkv.unflatten(-1, (-1, cache.shape[-1])).transpose(1, 2)
    key_heads = cache.shape[2]
    q, k, v = heads.split([heads.shape[1] - 2 * key_heads, key_heads, key_heads], dim=1)
    q = rotate(q, turn)
    q = q if sharpness is None else q * sharpness
    return q.to(cache.dtype), torch.stack([rotate(k, turn), v])


def _attention(q: Tensor, k: Tensor, v: Tensor, like: Tensor, **options: Any) -> Tensor:
    """Attention of grouped queries, with concatenated heads: ``(R, c, C)`` in the type of ``like``."""
    grouped = q.shape[1] != k.shape[1]
    if grouped and q.device.type == "cpu":  # PyTorch's kernels for a CPU do not share keys
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        grouped = False
    attended = F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped, **options)
    return attended.transpose(1, 2).flatten(2).to(like.dtype)
