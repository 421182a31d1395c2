"""Normalizing flows in plain torch; see `tarflow_scale.flows.bijection` for the contract that all keep.

`build` makes a flow of a section ``model``; `save_flow` and `load_flow` keep it as ``model.safetensors`` and
``config.json``, from which nothing runs. Each module is the page of its model: paper, equations, shapes, what differs
from public code. Images that do not fit a flow are a ValueError that says the shape; a folder that holds no flow is a
DataError.
"""

from tarflow_scale.config.sampling import Guidance
from tarflow_scale.flows.build import build
from tarflow_scale.flows.flow import Flow
from tarflow_scale.flows.glow import Glow
from tarflow_scale.flows.normal import standard_normal_log_prob
from tarflow_scale.flows.tarflow import TarFlow
from tarflow_scale.flows.weights import load_flow, save_flow

__all__ = ["Flow", "Glow", "Guidance", "TarFlow", "build", "load_flow", "save_flow", "standard_normal_log_prob"]
