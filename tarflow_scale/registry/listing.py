"""List all models of a registry; a model that cannot be read does not hide the others."""

import warnings

from tarflow_scale.errors import UserError
from tarflow_scale.registry.registry import Registry
from tarflow_scale.registry.state import ModelState

__all__ = ["readable_models"]


def readable_models(path: str) -> dict[str, ModelState]:
    """State of every readable model, by name. Warns about each model that cannot be read.

    Args:
        path: folder or URL of the registry.

    Raises:
        UserError: the registry has no model, or no model can be read.
    """
    states, failures = dict[str, ModelState](), list[UserError]()
    for model in Registry.models(path):
        try:
            states[model] = Registry(path, model).state()
        except UserError as error:
            failures.append(error)
    if not states:
        raise failures[0]
    for error in failures:
        warnings.warn(f"skipping a model that cannot be read: {error}", stacklevel=2)
    return states
