"""Which label a sample index gets: a function of (rule, seed, index) alone."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tarflow_scale.config.sampling import Labels, NamedLabels
from tarflow_scale.errors import ConfigError
from tarflow_scale.flows.conditions import class_number
from tarflow_scale.randomness import Purpose, raw_words

__all__ = ["balanced_labels", "check_labels", "labels_of", "numbered"]


def balanced_labels(indices: Sequence[int], num_classes: int) -> Tensor:
    """Label ``index mod num_classes`` for every index, ``(len(indices),)`` int64."""
    return torch.tensor([index % num_classes for index in indices], dtype=torch.int64)


def numbered(rule: NamedLabels, class_names: tuple[str, ...]) -> Labels:
    """A rule with numbers in place of names.

    Raises:
        ConfigError: no class has such a name.
    """
    if isinstance(rule, str):
        return "balanced"
    try:
        number = {one: class_number(one, class_names) if isinstance(one, str) else one for one in rule}
    except ValueError as error:
        raise ConfigError(f"sampling.labels {error}") from error
    if isinstance(rule, dict):
        return {number[one]: weight for one, weight in rule.items()}
    return tuple(number[one] for one in rule)


def labels_of(rule: Labels, indices: Sequence[int], num_classes: int, seed: int) -> Tensor:
    """Labels by a rule, ``(len(indices),)`` int64.

    Args:
        rule: ``balanced``; labels that are gone through in turn; or the weight of each label, by which it is drawn.
        indices: of samples.
        num_classes: of the flow.
        seed: of what is drawn.
    """
    if isinstance(rule, dict):
        classes = sorted(rule)
        edges = np.cumsum([rule[label] for label in classes])
        words = [raw_words(1, Purpose.LABEL, seed, index)[0] for index in indices]
        places = np.searchsorted(edges / edges[-1], np.array(words, dtype=np.float64) / 2.0**64, side="right")
        return torch.tensor([classes[min(place, len(classes) - 1)] for place in places.tolist()], dtype=torch.int64)
    if rule == "balanced":
        return balanced_labels(indices, num_classes)
    return torch.tensor([rule[index % len(rule)] for index in indices], dtype=torch.int64)


def check_labels(rule: Labels, num_classes: int | None) -> None:
    """Refuse labels that the flow does not have.

    Raises:
        ConfigError: labels for a flow without classes, out of range, or weights that are none.
    """
    if rule == "balanced":
        return
    if num_classes is None:
        raise ConfigError(f"sampling.labels needs a flow with classes (got {rule} for one without); leave it out")
    wrong = [label for label in rule if not 0 <= label < num_classes]
    if wrong or not rule:
        raise ConfigError(f"sampling.labels must be in 0..{num_classes - 1} (got {wrong or 'none'}); correct them")
    if isinstance(rule, dict) and (min(rule.values()) < 0 or not 0 < sum(rule.values()) < float("inf")):
        raise ConfigError(f"sampling.labels must be weights that are positive (got {rule}); correct them")
