"""Model registry: versions, metrics reports, aliases and gates, stored as files. It does not import torch.

A registry is a folder or bucket. ``<model>/_log/<n>.json`` are the events of a model; each contains the digest of the
event before it. ``blobs/sha256/<digest>`` are the files. Writers compete for the next event number and exactly one
wins; readers need no lock. A missing, damaged or modified event or blob raises an error that names it.

`Registry` reads and changes one model. `log` reads its events, and `state` computes the state of the model from them.
`store` keeps the blobs, and tests whether the folder or bucket supports create-if-absent. `gate` decides on promotions,
and `collection` deletes blobs that no version needs.
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
