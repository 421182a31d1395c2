"""Rotary position embedding of TarFlow blocks: queries and keys are rotated by the place of their token in the image.

Su et al., "RoFormer", arXiv 2104.09864, with two axes as in STARFlow (arXiv 2506.06276). The features of a head form
pairs (2 i, 2 i + 1), and pair i is rotated by an angle: the first half of the pairs by row * f_i, the second half by
column * f_i, with frequencies f_i = 10000^(-i / n) for n pairs of an axis. In a model with a prefix token, the last 8
pairs belong to a third axis, the place within the prefix; it is 0 for a single prefix token and for all image tokens,
so these pairs are not rotated.

In an image of h x w tokens, row and column are multiplied by side / sqrt(h w), where ``side`` is sqrt(h w) of the
training images, so that an image of another size has positions in the same range.

Shapes: T tokens, H head width, F = H / 2, L = T, or T + 1 with a prefix token.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["PREFIX_PAIRS", "rotate", "rotation"]

PREFIX_PAIRS = 8
"""Pairs of features that belong to the axis of the prefix."""
_BASE = 10_000.0


def rotation(
    height: int, width: int, head_width: int, has_prefix: bool, side: float, like: Tensor
) -> Float[Tensor, "2 L F"]:
    """Cosines and sines of the angles of all positions in row-major order, in fp32, or in fp64 if ``like`` is fp64.

    Args:
        height: number of rows of tokens.
        width: number of columns of tokens.
        head_width: number of features H of a head, a multiple of 4.
        has_prefix: whether a prefix token comes first; it is not rotated.
        side: square root of the number of tokens of a training image.
        like: a tensor on the right device.
    """
    pairs = (head_width // 2 - (PREFIX_PAIRS if has_prefix else 0)) // 2
    frequencies = _BASE ** -(_counted(pairs, like) / pairs)
    unit = side / math.sqrt(height * width)
    rows = (_counted(height, like) * unit)[:, None, None].expand(height, width, 1)
    columns = (_counted(width, like) * unit)[None, :, None].expand(height, width, 1)
    angles = torch.cat([rows * frequencies, columns * frequencies], dim=-1).flatten(0, 1)
    if has_prefix:
        angles = torch.nn.functional.pad(angles, (0, PREFIX_PAIRS, 1, 0))
    return torch.stack([angles.cos(), angles.sin()]).to(torch.promote_types(like.dtype, torch.float32))


def _counted(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, dtype=torch.float64, device=like.device)


def rotate(x: Float[Tensor, "... T H"], turn: Float[Tensor, "2 T F"] | None) -> Float[Tensor, "... T H"]:
    """Rotate the pairs of features of queries or keys by the cosines and sines of `rotation`; None changes nothing."""
    if turn is None:
        return x
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = turn
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x)
