"""Where units of work run."""

from typing import Literal

from pydantic import Field

from tarflow_scale.config.base import Section

__all__ = ["ClusterConfig"]


class ClusterConfig(Section):
    """Where units of work run."""

    executor: Literal["ray", "local"] = "ray"
    """``ray``: actors. ``local``: this process; the results are identical."""
    address: str | None = None
    """Address of a running Ray cluster; None starts one on this machine, on loopback."""
    num_workers: int = Field(default=2, ge=1)
    """Actors, each with one copy of the model."""
    cpus_per_worker: int = Field(default=1, ge=1)
    """CPU cores, and torch threads, of a worker."""
    gpus_per_worker: int = Field(default=0, ge=0)
    """GPUs of a worker."""
    start_seconds: float = Field(default=0.0, ge=0)
    """How long to wait for a cluster whose machines are still joining, before it is too small for the workers."""
