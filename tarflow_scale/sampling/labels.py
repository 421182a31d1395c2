"""Labels of samples. A label depends only on (rule, seed, sample index)."""

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
    """Convert a rule with class names to a rule with class numbers.

    Raises:
        ConfigError: a name in the rule is not the name of a class.
    """
    if isinstance(rule, str):
        return "balanced"
    try:
        number = {label: class_number(label, class_names) if isinstance(label, str) else label for label in rule}
    except ValueError as error:
        raise ConfigError(f"sampling.labels {error}") from error
    if isinstance(rule, dict):
        return {number[label]: weight for label, weight in rule.items()}
    return tuple(number[label] for label in rule)


def labels_of(rule: Labels, indices: Sequence[int], num_classes: int, seed: int) -> Tensor:
    """Labels of samples ``(len(indices),)`` int64.

    Args:
        rule: ``balanced``; a list of labels, which are used in turn; or a weight for each label, for random labels.
        indices: indices of the samples.
        num_classes: number of classes of the flow.
        seed: seed of random labels.
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
    """Check that a rule fits a flow.

    Raises:
        ConfigError: the flow has no classes, a label is out of range, or the weights are not valid.
    """
    if rule == "balanced":
        return
    if num_classes is None:
        raise ConfigError(
            f"sampling.labels needs a flow with classes (got {rule} and a flow without classes); remove it"
        )
    wrong = [label for label in rule if not 0 <= label < num_classes]
    if wrong or not rule:
        raise ConfigError(f"sampling.labels must be in 0..{num_classes - 1} (got {wrong or 'none'}); correct them")
    if isinstance(rule, dict) and (min(rule.values()) < 0 or not 0 < sum(rule.values()) < float("inf")):
        raise ConfigError(f"sampling.labels must have positive weights (got {rule}); correct them")
