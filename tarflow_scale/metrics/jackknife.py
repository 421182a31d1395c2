"""Standard errors by the delete-one-block jackknife.

A set of n images is cut by index into 50 blocks, and a measure is computed 50 times without one of them (Efron and
Stein, 1981). A bootstrap would repeat images and so bias distances between distributions upwards; a jackknife does not.
"""

import math
from collections.abc import Sequence

__all__ = ["NUM_BLOCKS", "blocks", "standard_error"]

NUM_BLOCKS = 50


def blocks(num: int) -> list[tuple[int, int]]:
    """``[start, stop)`` of each block of ``num`` images; 50 blocks, or one for each image if there are fewer."""
    count = min(NUM_BLOCKS, num)
    return [(i * num // count, (i + 1) * num // count) for i in range(count)]


def standard_error(without: Sequence[float]) -> float:
    """Standard error of a measure from its values without each block."""
    count = len(without)
    mean = math.fsum(without) / count
    return math.sqrt((count - 1) / count * math.fsum((value - mean) ** 2 for value in without))
