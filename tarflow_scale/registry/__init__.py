"""Which model the world sees: versions, reports, aliases and gates, as files. Never torch."""

from tarflow_scale.registry.gate import Contender, Decision, decide
from tarflow_scale.registry.lease import Lease
from tarflow_scale.registry.registry import ModelState, Registry

__all__ = ["Contender", "Decision", "Lease", "ModelState", "Registry", "decide"]
