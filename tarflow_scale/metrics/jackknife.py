"""How far a number would move with other samples: the delete-one-block jackknife.

A set of n images is cut by index into 50 blocks; a measure is computed 50 times without one of them (Efron and Stein,
1981). Unlike a bootstrap, which sees images twice, it does not bias distances between distributions upwards.
"""

import math
from collections.abc import Sequence

__all__ = ["NUM_BLOCKS", "blocks", "standard_error"]

NUM_BLOCKS = 50


def blocks(num: int) -> list[tuple[int, int]]:
    """``[start, stop)`` of each block of ``num`` images; fewer than 50 blocks where there are fewer images."""
    count = min(NUM_BLOCKS, num)
    return [(i * num // count, (i + 1) * num // count) for i in range(count)]


def standard_error(without: Sequence[float]) -> float:
    """Standard error of a measure from its values without each block."""
    count = len(without)
    mean = math.fsum(without) / count
    return math.sqrt((count - 1) / count * math.fsum((value - mean) ** 2 for value in without))
