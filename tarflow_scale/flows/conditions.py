"""Check and embed the condition of a flow, which is a label or a vector of numbers.

A label selects a row of a learned table. A vector of K numbers selects the sum of K rows, weighted by the numbers; so a
label is equivalent to a one-hot vector.
"""

import difflib
from collections.abc import Sequence
from numbers import Integral

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad

__all__ = [
    "Condition",
    "GivenCondition",
    "as_condition",
    "check_condition",
    "check_count",
    "class_number",
    "embed",
    "hides_values",
    "is_transformed",
]

Condition = Tensor | None
"""Labels ``(B,)`` int64 in [0, num_classes), or -1 for a dropped label; None drops all labels. For a flow that is
conditioned on vectors: floats ``(B, K)``."""
GivenCondition = Condition | np.ndarray | int | str | Sequence[int | str]
"""A condition as users may pass it: a `Condition`; one class for all samples, by number or name; or a list or array of
classes."""

_SHOWN_CLASSES = 10
_ALIKE = 0.6
"""An error message suggests a class name only if its similarity to the unknown name is at least this."""


def is_transformed() -> bool:
    """Whether this code runs under `torch.vmap`, another torch.func transformation or forward-mode differentiation."""
    if torch.compiler.is_compiling():  # compiled code cannot read the state of torch.func
        return False
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0  # pyright: ignore


def hides_values() -> bool:
    """Whether this code runs under a transformation, compiler or tracer, so that values of tensors cannot be read."""
    return is_transformed() or torch.compiler.is_compiling() or torch.jit.is_tracing()


def class_number(name: str, class_names: Sequence[str]) -> int:
    """The label of the class with this name.

    Raises:
        ValueError: no class has this name; the message suggests a similar name.
    """
    if name in class_names:
        return class_names.index(name)
    if not class_names:
        raise ValueError(
            f"must be numbers if the names of classes are not known (got {name}); pass numbers, or load the flow from "
            f"a registry, which stores the names"
        )
    alike = difflib.get_close_matches(name, class_names, 1, _ALIKE)
    meant = f", did you mean {alike[0]}?" if alike else ""
    there = ", ".join(class_names[:_SHOWN_CLASSES]) + (", .." if len(class_names) > _SHOWN_CLASSES else "")
    raise ValueError(f"must be class names or numbers (got {name}{meant}); the names are {there}")


def as_condition(y: GivenCondition, num: int, class_names: Sequence[str], device: torch.device) -> Condition:
    """Convert the argument ``y`` that a user passes into a `Condition` for ``num`` samples.

    Integers become int64, because torch reads an index of type uint8 as a mask, and rejects int8 and int16.

    Raises:
        ValueError: ``y`` contains something other than classes.
    """
    if isinstance(y, np.ndarray):
        y = torch.as_tensor(y) if y.dtype.kind in "biuf" else y.tolist()
    if y is None:
        return None
    if torch.is_tensor(y):
        return y.to(device) if y.is_floating_point() else y.to(device, torch.int64)
    classes = [y] if isinstance(y, str | Integral) else y
    if isinstance(classes, bytes) or not (
        isinstance(classes, Sequence) and all(isinstance(label, str | Integral) for label in classes)
    ):
        raise ValueError(
            f"labels must be a tensor, one class by number or name, or a list of classes (got {y!r}); correct them"
        )
    try:
        numbers = [class_number(label, class_names) if isinstance(label, str) else int(label) for label in classes]
    except ValueError as error:
        raise ValueError(f"labels {error}") from error
    labels = torch.tensor(numbers, dtype=torch.int64, device=device)
    return labels.expand(num) if isinstance(y, str | Integral) else labels


def embed(table: Float[Tensor, "K F"], y: Condition) -> Float[Tensor, "batch F"]:
    """Return the row of ``table`` for each label, and the mean of all rows for a dropped label.

    If ``y`` is None, the result is one row, the mean of all rows. Conditions ``(B, K)`` give weighted sums of rows.
    """
    if y is not None and y.ndim == 2:
        with torch.autocast(table.device.type, enabled=False):  # bf16 would round all recent years to the same number
            return y.to(table.dtype) @ table
    dropped = table.mean(dim=0, keepdim=True)
    if y is None:
        return dropped
    return torch.where(y[:, None] < 0, dropped, table[y.clamp(min=0)])


def check_count(y: Condition, batch_size: int, num_conditions: int | None) -> None:
    """Raise ValueError unless there is one label or one vector for each sample; values are not read.

    Vectors cannot be dropped, because no replacement is defined for them.
    """
    if num_conditions is not None:
        if y is None or tuple(y.shape) != (batch_size, num_conditions):
            got = None if y is None else tuple(y.shape)
            raise ValueError(f"conditions must have shape ({batch_size}, {num_conditions}) (got {got}); pass them as y")
    elif y is not None and y.shape != (batch_size,):
        raise ValueError(f"labels must have shape ({batch_size},) (got {tuple(y.shape)}); pass one label per sample")


def check_condition(y: Condition, batch_size: int, num_classes: int | None, num_conditions: int | None) -> None:
    """Raise ValueError if labels or conditions do not fit a flow; this reads their values."""
    if num_conditions is not None:
        check_count(y, batch_size, num_conditions)
        assert y is not None
        if not y.is_floating_point() or not (hides_values() or bool(torch.isfinite(y).all())):
            raise ValueError(f"conditions must be finite floats (got {y.dtype}); check how they were made")
        return
    if y is None:
        return
    if num_classes is None:
        raise ValueError("this flow takes no labels (it was built with num_classes=None); pass y=None")
    check_count(y, batch_size, None)
    if y.is_floating_point():
        raise ValueError(f"labels must be integers (got {y.dtype}); convert them to int64")
    if batch_size == 0 or hides_values():
        return
    low, high = int(y.min()), int(y.max())
    if low < -1 or high >= num_classes:
        bad = low if low < -1 else high
        raise ValueError(f"labels must be in [0, {num_classes}) or -1 for dropped (got {bad}); check the labels")
