"""Which model the world sees: versions, reports, aliases and gates, as files. Never torch."""

from tarflow_scale.registry import collection
from tarflow_scale.registry.gate import Contender, Decision, decide
from tarflow_scale.registry.lease import Lease
from tarflow_scale.registry.registry import Registry
from tarflow_scale.registry.state import ModelState, resolve
from tarflow_scale.registry.store import Store

__all__ = ["Contender", "Decision", "Lease", "ModelState", "Registry", "Store", "collection", "decide", "resolve"]
