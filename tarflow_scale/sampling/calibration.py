"""Which chunks of tokens decode each block fastest, measured on the device that will decode.

A chunk of c tokens trades reading the cache and the weights once a token for computing c tokens a few times over; what
wins depends on block, batch and device, and one block of a model is often harder than the others (arXiv 2505.12849,
2505.24791). Hence every block is decoded in every way, from the exact output of the block before, and the fastest of
those whose error stays within the tolerance is taken; token by token is always among them.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from tarflow_scale.config.sampling import Guidance, SamplingConfig
from tarflow_scale.flows.conditions import Condition
from tarflow_scale.records import BlockPlan, DecodingPlan
from tarflow_scale.sampling.decode import BlockReport, Schedule, TarFlowDecoder

__all__ = ["blocks_one_by_one", "candidates", "measure_blocks", "measured_with", "schedules_of", "timed"]

Result = TypeVar("Result")
_SMALLEST = 8
_REPEATS = 2


def candidates(num_tokens: int) -> list[int]:
    """Chunks to try for T tokens: all at once, then halves, down to 8."""
    chunks = [num_tokens - 1] if num_tokens > 2 else []
    while chunks and chunks[-1] // 2 >= _SMALLEST:
        chunks.append(chunks[-1] // 2)
    return chunks


def blocks_one_by_one(num_blocks: int) -> list[BlockPlan]:
    """Exact decoding as a plan."""
    return [BlockPlan(chunk=1, planned=1)] * num_blocks


def schedules_of(blocks: Sequence[BlockPlan], tolerance: float) -> list[Schedule]:
    """What the decoder takes."""
    return [Schedule(block.chunk, block.planned, tolerance) for block in blocks]


def measured_with(plan: DecodingPlan, settings: SamplingConfig) -> bool:
    """Whether a plan is about these settings."""
    wanted = settings.guidance, settings.decoder.precision, settings.decoder.tolerance
    return wanted == (plan.guidance, plan.precision, plan.tolerance)


def measure_blocks(
    decoder: TarFlowDecoder, z: Tensor, y: Condition, guidance: Guidance | None, tolerance: float
) -> list[BlockPlan]:
    """The fastest way to decode each block, in the order of decoding.

    Args:
        decoder: of the flow.
        z: latents ``(B, T D)`` of a batch as it will be decoded.
        y: labels, or None.
        guidance: None or one that has an effect.
        tolerance: largest error of a token's feature, and the move at which iterating ends.
    """
    tokens = decoder.tokens_of(z)
    blocks: list[BlockPlan] = []
    for number in range(len(decoder.networks())):

        def run(schedule: Schedule, number: int = number, tokens: Tensor = tokens) -> tuple[Tensor, BlockReport]:
            return decoder.decode_block(number, tokens, y, guidance, schedule)

        (exact, _), fastest = timed(partial(run, Schedule()), z.device)
        best = BlockPlan(chunk=1, planned=1)
        for chunk in candidates(decoder.num_tokens):
            _, report = run(Schedule(chunk, 1, tolerance))
            planned = sorted(report.iterations)[len(report.iterations) // 2]
            (found, _), seconds = timed(partial(run, Schedule(chunk, planned, tolerance)), z.device)
            if float((found - exact).abs().max()) <= tolerance and seconds < fastest:
                best, fastest = BlockPlan(chunk=chunk, planned=planned), seconds
        blocks.append(best)
        tokens = exact
    return blocks


def timed(run: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """A result, and the seconds of the fastest of two runs."""
    seconds: list[float] = []
    for _ in range(_REPEATS):
        _synchronize(device)
        started = time.perf_counter()
        result = run()
        _synchronize(device)
        seconds.append(time.perf_counter() - started)
    return result, min(seconds)  # pyright: ignore[reportReturnType, reportPossiblyUnboundVariable]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
