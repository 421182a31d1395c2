"""Normalizing flows in plain torch; see `tarflow_scale.flows.flow` for the contract that all keep."""

from tarflow_scale.config import Guidance
from tarflow_scale.flows.build import build
from tarflow_scale.flows.flow import Flow
from tarflow_scale.flows.glow import Glow
from tarflow_scale.flows.normal import standard_normal_log_prob
from tarflow_scale.flows.tarflow import TarFlow
from tarflow_scale.flows.weights import load_flow, save_flow

__all__ = ["Flow", "Glow", "Guidance", "TarFlow", "build", "load_flow", "save_flow", "standard_normal_log_prob"]
