"""Normalizing flows in plain torch; see `tarflow_scale.flows.bijection` for the contract of all flows.

`build` makes a flow from the section ``model`` of a configuration. `save_flow` and `load_flow` write and read it as
``model.safetensors`` and ``config.json``; loading executes no code from these files. The module of each model documents
its paper, equations, shapes and differences from public code. Images that do not fit a flow raise a ValueError that
names the expected shape; `load_flow` raises a DataError if a folder contains no flow.
"""

from tarflow_scale.config.sampling import Guidance
from tarflow_scale.flows.build import build
from tarflow_scale.flows.flow import Flow
from tarflow_scale.flows.glow import Glow
from tarflow_scale.flows.normal import standard_normal_log_prob
from tarflow_scale.flows.tarflow import TarFlow
from tarflow_scale.flows.weights import load_flow, save_flow

__all__ = ["Flow", "Glow", "Guidance", "TarFlow", "build", "load_flow", "save_flow", "standard_normal_log_prob"]
