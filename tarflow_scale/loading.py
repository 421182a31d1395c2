"""A flow from a registry or a folder: what a notebook user types, and what workers do."""

from tarflow_scale.errors import RegistryError
from tarflow_scale.flows import Flow, load_flow
from tarflow_scale.flows.weights import flow_from_files
from tarflow_scale.registry import Registry

__all__ = ["load", "load_version"]


def load(source: str, registry: str | None = None) -> Flow:
    """Load a flow, in evaluation mode on the CPU.

    Args:
        source: a folder or URL that `save_flow` wrote; or, with ``registry``, ``model@version`` where the version is
            a number, an alias or ``latest``.
        registry: folder or URL of a registry.

    Raises:
        UserError: there is no such flow.
    """
    if registry is None:
        return load_flow(source)
    model, separator, reference = source.partition("@")
    if not separator or not reference:
        raise RegistryError(f"a version is model@version (got {source!r}); for example digits@champion")
    return load_version(registry, model, reference)


def load_version(registry: str, model: str, reference: int | str) -> Flow:
    """Load a registered version; every file is verified against its digest."""
    store = Registry(registry, model)
    version = store.resolve(reference)
    return flow_from_files(store.read_files(version), f"{model}@{version.version}")
