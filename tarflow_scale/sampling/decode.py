"""Decode latents to data through TarFlow's blocks. Each block is decoded in chunks of tokens.

The inverse of a block solves x_t = z_t exp(s_t(x_<t)) + m_t(x_<t) for t = 0, 1, ...; token 0 is z_0. Each iteration
computes all tokens of a chunk at once from their previous values (Jacobi iteration) and from the final keys and values
of earlier chunks (Gauss-Seidel). A chunk of one token needs one iteration; this is exact token-by-token decoding. A
chunk of all tokens is the Jacobi iteration of the whole sequence. After i iterations the first i tokens of a chunk are
exact for any initial values, so c tokens take at most c iterations.

For speed, weights are cast once, not at every token; the cache of one block is allocated once and written in place; the
two predictions of guidance share a batch; on a GPU the kernels of a token are replayed as a CUDA graph, one graph for
every `_BUCKET` positions. Scale and mean are applied in fp32 (fp64 for an fp64 flow).

Shapes: B batch, R rows (B, or 2 B with guidance), T tokens, D features, C width, N heads, H head width, L layers.
"""

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tarflow_scale.config.sampling import Guidance
from tarflow_scale.flows.conditions import Condition
from tarflow_scale.flows.flow import Decode, Flow
from tarflow_scale.flows.guidance import guided
from tarflow_scale.flows.tarflow import TarFlow, TarFlowBlock, unpatchify
from tarflow_scale.sampling.network import BlockNetwork

__all__ = ["BlockCost", "Progress", "Schedule", "TarFlowDecoder", "decoder_of"]

_LIMIT = 1e4
"""Every iteration clamps tokens to this magnitude. Otherwise, tokens that have not converged could overflow and turn
tokens that have converged into NaN."""
_RECHECK = 2
"""Number of iterations between convergence tests, after the planned iterations."""
_ACTIVATIONS = 16
"""Upper bound of the activation values per token, divided by C: queries, keys, values, two of width 4 C, copies."""

Progress = Callable[[int], object]
"""A function that is called with the number of tokens that have just become final. The sum is T - 1 for each block."""


@dataclass(frozen=True)
class Schedule:
    """The chunk size and number of iterations with which a block is decoded.

    chunk: number of tokens that are decoded together. planned: number of iterations before the first convergence test;
    a test synchronizes with the device. tolerance: iterations end when no feature changes by more than this.
    """

    chunk: int = 1
    planned: int = 1
    tolerance: float = 0.0


@dataclass(frozen=True)
class BlockCost:
    """Cost of decoding a block: number of iterations of each chunk, and largest feature change in the last iteration.

    A chunk with as many iterations as tokens is exact; it counts as 0 in ``last_move``.
    """

    chunk: int
    iterations: tuple[int, ...]
    last_move: float


class TarFlowDecoder:
    """Decodes latents of a TarFlow, token by token unless schedules are given.

    The flow may be moved to another device, trained or modified between calls; changed weights are cast again. Threads
    that share a decoder decode one after the other, because they share its cache and CUDA graphs. A copied or pickled
    decoder contains neither the cache nor the graphs.

    Args:
        flow: the TarFlow.
        dtype: precision of the transformers; None uses the flow's. Affine maps are computed in fp32 or wider.
    """

    def __init__(self, flow: TarFlow, dtype: torch.dtype | None = None) -> None:
        self._flow = flow
        self._dtype = dtype
        self._start()

    def _start(self) -> None:
        self._lock = threading.RLock()
        self._pointers: list[int] = []
        self._checksums: list[list[int]] = []
        self._networks: list[BlockNetwork] = []
        self._cache: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_flow": self._flow, "_dtype": self._dtype}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the transformers."""
        return self._dtype or next(self._flow.parameters()).dtype

    @property
    def num_tokens(self) -> int:
        """Number of tokens T."""
        return self._blocks[0].num_tokens

    @property
    def steps_per_block(self) -> int:
        """Number of tokens of a block that are decoded: T - 1, or T with a start token."""
        return self.num_tokens - (self._blocks[0].start_token is None)

    @property
    def num_steps(self) -> int:
        """Total number of tokens that a call reports to ``progress``."""
        return len(self._blocks) * self.steps_per_block

    @property
    def _blocks(self) -> list[TarFlowBlock]:
        return list(self._flow.blocks)  # type: ignore[arg-type]

    def networks(self) -> list[BlockNetwork]:
        """The blocks in the order of decoding, with the current weights of the flow.

        Weights are shared with the flow if they need no cast. On a CPU, checksums of the weights show whether cast or
        packed copies are outdated, because a write to ``parameter.data`` does not change a version counter. On a GPU,
        copies are always cast again.
        """
        with self._lock, torch.inference_mode(False), torch.no_grad():
            on_cpu = self._device.type == "cpu"
            pointers = [parameter.data_ptr() for parameter in self._flow.parameters()]
            if pointers == self._pointers and not on_cpu:
                for network in self._networks:
                    network.cast_again()
            checksums = [network.checksums() for network in self._networks] if on_cpu else []
            if (pointers, checksums) != (self._pointers, self._checksums):
                self._cache = None
                self._networks = [BlockNetwork(block, self.dtype) for block in reversed(self._blocks)]
                self._checksums = [network.checksums() for network in self._networks] if on_cpu else []
                self._pointers = pointers
            return self._networks

    @property
    def _device(self) -> torch.device:
        return next(self._flow.parameters()).device

    def bytes_per_row(self, chunk: int = 1) -> int:
        """Bytes of memory per row: the row's part of the cache, and the activations of a chunk."""
        width, count = max(block.width for block in self._blocks), min(chunk, self.num_tokens)
        return self._cache_size(1) * self.networks()[0].cache_dtype.itemsize + (
            _ACTIVATIONS * width * count * self.dtype.itemsize
        )

    def cache(self, rows: int) -> Tensor:
        """Buffer for the keys and values of any block, which all blocks and later calls reuse; see `_cache_of`."""
        size = self._cache_size(rows)
        if self._cache is None or len(self._cache) != size:
            self._cache = None  # free the old one first
            network = (self._networks or self.networks())[0]
            self._cache = torch.zeros(size, dtype=network.cache_dtype, device=self._device)
        return self._cache

    def _cache_size(self, rows: int) -> int:
        return max(math.prod(network.cache_shape(rows)) for network in self._networks or self.networks())

    def _cache_of(self, network: BlockNetwork, rows: int) -> Tensor:
        shape = network.cache_shape(rows)
        return self.cache(rows)[: math.prod(shape)].view(shape)

    def __call__(
        self,
        z: Tensor,
        y: Condition = None,
        guidance: Guidance | None = None,
        schedules: Sequence[Schedule] | None = None,
        progress: Progress | None = None,
    ) -> tuple[Tensor, list[BlockCost]]:
        """Decode latents ``(B, T D)`` to data ``(B, C, H, W)``, before any logit transform; also return block costs.

        Args:
            z: latents in token order.
            y: labels, or None.
            guidance: guidance, or None if it has no effect.
            schedules: schedule of each block, in the order of decoding; None decodes token by token.
            progress: see `Progress`.
        """
        costs: list[BlockCost] = []
        with self._lock, torch.inference_mode(False), torch.no_grad():
            tokens = self.tokens_of(z)
            for number, network in enumerate(self.networks()):
                schedule = schedules[number] if schedules is not None else Schedule()
                tokens, cost = self._decode(number, network, tokens, y, guidance, schedule, progress)
                costs.append(cost)
        return unpatchify(tokens, self._flow.patch_size, self._flow.event_shape[1]), costs

    def as_decode(self, progress: Callable[[float], object]) -> Decode:
        """A function for `Flow.inverse`; it calls ``progress`` with the share of work done since the previous call."""

        def decode(z: Tensor, y: Condition, guidance: Guidance | None) -> Tensor:
            with self._lock:
                x, _ = self(z, y, guidance, progress=lambda tokens: progress(tokens / self.num_steps))
                self._cache = None  # it can take gigabytes, which should not stay allocated between calls
            return x

        return decode

    def tokens_of(self, z: Tensor) -> Tensor:
        """Convert latents ``(B, T D)`` to tokens ``(B, T, D)``, the input of the first decoded block."""
        exact = torch.float64 if next(self._flow.parameters()).dtype == torch.float64 else torch.float32
        tokens = z.to(exact).view(len(z), self.num_tokens, -1)
        return tokens if self._flow.log_std is None else tokens * torch.exp(self._flow.log_std.detach())

    def decode_block(
        self,
        number: int,
        z: Tensor,
        y: Condition,
        guidance: Guidance | None,
        schedule: Schedule,
    ) -> tuple[Tensor, BlockCost]:
        """Invert one block for ``z (B, T, D)``, whose tokens are in image order.

        ``number`` counts the blocks in decoding order. Returns the inverse and its cost.
        """
        with self._lock, torch.inference_mode(False), torch.no_grad():
            return self._decode(number, self.networks()[number], z, y, guidance, schedule, None)

    def _decode(
        self,
        number: int,
        network: BlockNetwork,
        z: Tensor,
        y: Condition,
        guidance: Guidance | None,
        schedule: Schedule,
        progress: Progress | None,
    ) -> tuple[Tensor, BlockCost]:
        block = network.block
        if not block.follows(guidance) or (number and guidance is not None and guidance.blocks == "first"):
            guidance = None
        batch, z = len(z), block.order(z).contiguous()
        offsets, prefix, sharpness = network.offsets(y, batch), block.prefix(y, batch), None
        if guidance is not None:
            offsets = torch.cat([offsets, network.offsets(None, batch)])
            prefix = None if prefix is None else torch.cat([prefix, block.prefix(None, batch)])  # type: ignore[list-item]
            if guidance.attention_temperature != 1:
                sharpness = offsets.new_ones(2 * batch, 1, 1, 1)
                sharpness[batch:] /= guidance.attention_temperature
        cache = self._cache_of(network, len(offsets))
        if prefix is not None:
            network.read_prefix(prefix, cache, sharpness)
        if block.start_token is not None:
            z = block.after_start(z)
        steps = z.shape[1] - 1
        predict = _Predictor(network, offsets[:, :steps], cache, sharpness, guidance)
        x = z.clone()
        iterations: list[int] = []
        moves: list[Tensor] = []
        for start in range(0, steps, schedule.chunk):
            stop = min(start + schedule.chunk, steps)
            if stop - start == 1:
                x[:, stop] = predict(x, z, start, stop)[:, 0]
                count = 1
            else:
                count, move = _iterate(predict, x, z, start, stop, schedule)
                moves.append(move)
            iterations.append(count)
            if progress is not None:
                progress(stop - start)
        last_move = float(torch.stack(moves).max()) if moves else 0.0
        x = x if block.start_token is None else x[:, 1:]
        return block.order(x), BlockCost(schedule.chunk, tuple(iterations), last_move)


class _Predictor:
    """Computes tokens ``start + 1`` to ``stop`` from the tokens before them, with guidance."""

    def __init__(
        self, network: BlockNetwork, offsets: Tensor, cache: Tensor, sharpness: Tensor | None, guidance: Guidance | None
    ) -> None:
        self._network, self._offsets, self._cache = network, offsets, cache
        self._sharpness, self._guidance = sharpness, guidance
        if guidance is not None:
            steps, exact = offsets.shape[1], torch.float64 if offsets.dtype == torch.float64 else torch.float32
            ramp = torch.arange(1, steps + 1, device=offsets.device, dtype=exact)[:, None] / steps
            self._strengths = guidance.scale * (ramp if guidance.annealed else torch.ones_like(ramp))

    def __call__(self, x: Tensor, z: Tensor, start: int, stop: int) -> Tensor:
        part = slice(start, stop)
        log_scale, mean = self._network.parameters(
            x[:, part], self._offsets[:, part], self._cache, start, self._sharpness
        )
        if self._guidance is not None:
            mean, weak_mean = mean.chunk(2)
            log_scale, weak_log_scale = (None, None) if log_scale is None else log_scale.chunk(2)
            strengths = self._strengths[part]
            log_scale, mean = guided(log_scale, mean, weak_log_scale, weak_mean, strengths, self._guidance)
        latents = z[:, start + 1 : stop + 1]
        return latents + mean if log_scale is None else torch.addcmul(mean, latents, torch.exp(log_scale))


def _iterate(
    predict: _Predictor, x: Tensor, z: Tensor, start: int, stop: int, schedule: Schedule
) -> tuple[int, Tensor]:
    """Solve for tokens ``start + 1`` to ``stop`` of ``x`` in place. Returns the iteration count and the last change."""
    following = slice(start + 1, stop + 1)
    count, move = 0, x.new_zeros(())
    while count < stop - start:
        count += 1
        new = predict(x, z, start, stop)
        new = torch.nan_to_num(new, nan=0.0, posinf=_LIMIT, neginf=-_LIMIT).clamp_(-_LIMIT, _LIMIT)
        move = (new - x[:, following]).abs().amax()
        x[:, following] = new
        due = count >= schedule.planned and (count - schedule.planned) % _RECHECK == 0
        if due and count < stop - start and float(move) <= schedule.tolerance:
            return count, move
    return stop - start, torch.zeros_like(move)


def decoder_of(flow: Flow, dtype: torch.dtype | None = None) -> TarFlowDecoder | None:
    """The fast decoder of a TarFlow, with transformers in precision ``dtype``; None for other flows."""
    return TarFlowDecoder(flow, dtype) if isinstance(flow, TarFlow) else None
