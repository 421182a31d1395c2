"""Standard errors by the delete-one-block jackknife.

A set of n images is divided by index into 50 blocks, and a measure is computed 50 times, each time without one block
(Efron and Stein, 1981). A bootstrap would repeat images, which biases distances between distributions upwards; a
jackknife does not.
"""

import math
from collections.abc import Sequence

__all__ = ["NUM_BLOCKS", "blocks", "standard_error"]

NUM_BLOCKS = 50


def blocks(num: int) -> list[tuple[int, int]]:
    """Divide ``num`` images into 50 ranges ``[start, stop)``; fewer than 50 images get one range per image."""
    count = min(NUM_BLOCKS, num)
    return [(i * num // count, (i + 1) * num // count) for i in range(count)]


def standard_error(without: Sequence[float]) -> float:
    """Standard error of a measure; ``without[i]`` is its value when block i is left out."""
    count = len(without)
    mean = math.fsum(without) / count
    return math.sqrt((count - 1) / count * math.fsum((value - mean) ** 2 for value in without))
