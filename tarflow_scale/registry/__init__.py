"""Which model the world sees: versions, reports, aliases and gates, as files. Never torch.

On disk (folder or bucket): ``<model>/_log/<n>.json`` are events, each with the digest of the one before;
``blobs/sha256/`` the files by digest. `Registry` is one model, `EventLog` its log, `state` what the log adds up to,
`Store` the blobs and proof of create-if-absent, `gate` the decision, `collection` what may go. Writers race for the
next number and one wins; readers need no lock. A missing, damaged or changed event or blob is an error that names it.
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
