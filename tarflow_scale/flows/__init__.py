"""Normalizing flows in plain torch; see `tarflow_scale.flows.flow` for the contract that all keep."""

from tarflow_scale.flows.build import build
from tarflow_scale.flows.flow import Flow, standard_normal_log_prob
from tarflow_scale.flows.tarflow import TarFlow
from tarflow_scale.flows.weights import load_flow, save_flow

__all__ = ["Flow", "TarFlow", "build", "load_flow", "save_flow", "standard_normal_log_prob"]
