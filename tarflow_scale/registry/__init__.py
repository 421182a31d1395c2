"""Model registry: versions, metrics reports, aliases and gates, stored as files. It does not import torch.

In a folder or bucket, ``<model>/_log/<n>.json`` are the events of a model, each with the digest of the event before it,
and ``blobs/sha256/<digest>`` are files. `Registry` is one model, `EventLog` its log, `state` the state that the events
add up to, `Store` the blobs and the test for create-if-absent, `gate` the promotion decision, `collection` garbage
collection. Writers compete for the next event number and exactly one wins; readers need no lock. A missing, damaged or
modified event or blob raises an error that names it.
"""

from tarflow_scale.registry import collection
from tarflow_scale.registry.gate import Contender, Decision, decide, lead, read_contender
from tarflow_scale.registry.lease import Lease
from tarflow_scale.registry.listing import readable_models
from tarflow_scale.registry.registry import Registry
from tarflow_scale.registry.state import ModelState, resolve
from tarflow_scale.registry.store import Store

__all__ = [
    "Contender",
    "Decision",
    "Lease",
    "ModelState",
    "Registry",
    "Store",
    "collection",
    "decide",
    "lead",
    "read_contender",
    "readable_models",
    "resolve",
]
