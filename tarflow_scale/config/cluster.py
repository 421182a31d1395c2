"""The section ``cluster``: where units of work run."""

from typing import Literal

from pydantic import Field

from tarflow_scale.config.base import Section

__all__ = ["ClusterConfig"]


class ClusterConfig(Section):
    """Where units of work run."""

    executor: Literal["ray", "local"] = "ray"
    """``ray``: on Ray actors. ``local``: in this process. The results are identical."""
    address: str | None = None
    """Address of a running Ray cluster; None starts one on this machine, on loopback."""
    num_workers: int = Field(default=2, ge=1)
    """Number of actors; each has one copy of the model."""
    cpus_per_worker: int = Field(default=1, ge=1)
    """CPU cores, and torch threads, of each worker."""
    gpus_per_worker: int = Field(default=0, ge=0)
    """GPUs of each worker."""
    start_seconds: float = Field(default=0.0, ge=0)
    """Time to wait until enough machines for all workers have joined the cluster."""
