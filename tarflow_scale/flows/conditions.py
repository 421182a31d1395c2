"""What a flow is conditioned on: a label, or a vector of numbers; how it becomes features, and when it does not fit.

A label is a row of a learned table. A vector of K numbers is a sum of K rows, weighted by them, so a label is the
special case of a vector with a single one.
"""

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["Condition", "check_condition", "check_count", "embed"]

Condition = Tensor | None
"""Labels ``(B,)`` int64 in [0, num_classes), -1 where the label is dropped, or None, which drops all of them; floats
``(B, K)`` for a flow that is conditioned on vectors."""


def embed(table: Float[Tensor, "K F"], y: Condition) -> Float[Tensor, "batch F"]:
    """Rows of ``table`` by label, the mean of all rows where the label is dropped; one row if ``y`` is None.

    Of conditions ``(B, K)``, sums of its rows.
    """
    if y is not None and y.ndim == 2:
        with torch.autocast(table.device.type, enabled=False):  # years would be one year in bf16
            return y.to(table.dtype) @ table
    dropped = table.mean(dim=0, keepdim=True)
    if y is None:
        return dropped
    return torch.where(y[:, None] < 0, dropped, table[y.clamp(min=0)])


def check_count(y: Condition, batch_size: int, num_conditions: int | None) -> None:
    """Raise ValueError unless there is one label, or one vector, per sample; costs nothing.

    Vectors cannot be dropped, as nothing says what stands in their place.
    """
    if y is not None and not torch.is_tensor(y):
        raise ValueError(f"labels must be a tensor, or one number for all (got {y!r})")
    if num_conditions is not None:
        if y is None or tuple(y.shape) != (batch_size, num_conditions):
            got = None if y is None else tuple(y.shape)
            raise ValueError(f"conditions must have shape ({batch_size}, {num_conditions}) (got {got}); pass y")
    elif y is not None and y.shape != (batch_size,):
        raise ValueError(f"labels must have shape ({batch_size},) (got {tuple(y.shape)}); pass one per sample")


def check_condition(y: Condition, batch_size: int, num_classes: int | None, num_conditions: int | None) -> None:
    """Raise ValueError when labels or conditions do not fit a flow; looks at their values."""
    if num_conditions is not None:
        check_count(y, batch_size, num_conditions)
        assert y is not None
        if not y.is_floating_point() or not bool(torch.isfinite(y).all()):
            raise ValueError(f"conditions must be finite floats (got {y.dtype}); check how they were made")
        return
    if y is None:
        return
    if num_classes is None:
        raise ValueError("this flow takes no labels (it was built with num_classes=None); pass y=None")
    check_count(y, batch_size, None)
    if y.is_floating_point():
        raise ValueError(f"labels must be integers (got {y.dtype}); convert them to int64")
    if batch_size == 0:
        return
    low, high = int(y.min()), int(y.max())
    if low < -1 or high >= num_classes:
        bad = low if low < -1 else high
        raise ValueError(f"labels must be in [0, {num_classes}) or -1 for dropped (got {bad}); check the labels")
