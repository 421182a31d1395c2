"""Measure which chunk size decodes each block fastest on a device.

Decoding in chunks of c tokens reads the cache and the weights less often than decoding single tokens, but computes
each token several times. The best size depends on block, batch and device, and one block of a model is often harder
than the others (arXiv 2505.12849, 2505.24791). So every block is decoded with every size from the exact output of the
previous block; the fastest size with an error within the tolerance is chosen. Token-by-token decoding is always a
candidate.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from tarflow_scale.config.sampling import Guidance, SamplingConfig
from tarflow_scale.flows.conditions import Condition
from tarflow_scale.records import BlockDecoding, Calibration
from tarflow_scale.sampling.decode import BlockCost, Schedule, TarFlowDecoder

__all__ = ["candidates", "measure_blocks", "measured_with", "schedules_of", "timed"]

Result = TypeVar("Result")
_SMALLEST = 8
_REPEATS = 2


def candidates(steps: int) -> list[int]:
    """Chunk sizes to try for a number of decoded tokens: all, then half of the previous size, down to 8."""
    chunks = [steps] if steps > 1 else []
    while chunks and chunks[-1] // 2 >= _SMALLEST:
        chunks.append(chunks[-1] // 2)
    return chunks


def schedules_of(blocks: Sequence[BlockDecoding], tolerance: float) -> list[Schedule]:
    """Convert measured block settings to schedules for the decoder."""
    return [Schedule(block.chunk, block.planned, tolerance) for block in blocks]


def measured_with(calibration: Calibration, settings: SamplingConfig) -> bool:
    """Whether a calibration was measured with the guidance, precision and tolerance of ``settings``."""
    wanted = settings.guidance, settings.decoder.precision, settings.decoder.tolerance
    return wanted == (calibration.guidance, calibration.precision, calibration.tolerance)


def measure_blocks(
    decoder: TarFlowDecoder, z: Tensor, y: Condition, guidance: Guidance | None, tolerance: float
) -> list[BlockDecoding]:
    """The fastest way to decode each block, in the order of decoding.

    Args:
        decoder: decoder of the flow.
        z: latents ``(B, T D)`` of a batch.
        y: labels, or None.
        guidance: guidance, or None if it has no effect.
        tolerance: largest allowed error of a feature; iterations end when no feature changes by more than this.
    """
    tokens = decoder.tokens_of(z)
    blocks: list[BlockDecoding] = []
    for number in range(len(decoder.networks())):

        def run(schedule: Schedule, number: int = number, tokens: Tensor = tokens) -> tuple[Tensor, BlockCost]:
            return decoder.decode_block(number, tokens, y, guidance, schedule)

        (exact, _), fastest = timed(partial(run, Schedule()), z.device)
        best = BlockDecoding(chunk=1, planned=1)
        for chunk in candidates(decoder.steps_per_block):
            _, cost = run(Schedule(chunk, 1, tolerance))
            planned = sorted(cost.iterations)[len(cost.iterations) // 2]
            (decoded, _), seconds = timed(partial(run, Schedule(chunk, planned, tolerance)), z.device)
            if float((decoded - exact).abs().max()) <= tolerance and seconds < fastest:
                best, fastest = BlockDecoding(chunk=chunk, planned=planned), seconds
        blocks.append(best)
        tokens = exact
    return blocks


def timed(run: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """Run a function twice. Returns its result and the time in seconds of the faster run."""
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
