"""The section ``cluster``: where units of work run."""

from typing import Literal

from pydantic import Field

from tarflow_scale.config.base import Section

__all__ = ["ClusterConfig"]


class ClusterConfig(Section):
    """Where units of work run."""

    executor: Literal["ray", "local"] = "ray"
    """``ray``: run on Ray actors. ``local``: run in this process. The results are identical."""
    address: str | None = None
    """Address of a running Ray cluster; None starts a cluster on this machine that listens only on loopback."""
    num_workers: int = Field(default=2, ge=1)
    """Number of Ray actors; each loads a copy of the model."""
    cpus_per_worker: int = Field(default=1, ge=1)
    """Number of CPU cores and of torch threads per worker."""
    gpus_per_worker: int = Field(default=0, ge=0)
    """Number of GPUs per worker."""
    start_seconds: float = Field(default=0.0, ge=0)
    """Maximum time to wait until the cluster answers and has the resources for all workers."""
