"""Query a running Ray cluster before any work is submitted to it."""

import importlib
from dataclasses import dataclass
from typing import Any

from tarflow_scale.errors import ConfigError, UserError
from tarflow_scale.pool.address import (
    CONNECT_SECONDS,
    check_token,
    found_by_ray,
    is_own_address,
    on_loopback_alone,
    token_in_words,
)

__all__ = ["ClusterFacts", "look_at"]


@dataclass(frozen=True)
class ClusterFacts:
    """Versions and resources of a running cluster."""

    ray_version: str
    python_version: str
    num_nodes: int
    num_cpus: float
    num_gpus: float
    here: bool
    """Whether this machine is a node of the cluster; other machines can submit work only through ``ray://``."""


def look_at(address: str) -> ClusterFacts | None:
    """Ask a running cluster for its versions and resources, with the token of this process. This starts no work there.

    Args:
        address: see `Pool`.

    Returns:
        Versions and resources; None for ``ray://``, because a Ray client server reports nothing before it gets work.

    Raises:
        UserError: a required token is missing or wrong, nothing answers, or the cluster has no live node.
    """
    check_token(address)
    on_loopback_alone(address)
    if address == "auto":
        address = found_by_ray() or address
    if address.startswith("ray://"):
        return None
    from ray.exceptions import AuthenticationError, RayError

    raylet: Any = importlib.import_module("ray._raylet")
    usage: Any = importlib.import_module("ray._common.usage.usage_lib")
    try:
        client = raylet.GcsClient(address=address)
        versions = usage.get_cluster_metadata(client)
        nodes = [node for node in client.get_all_node_info(timeout=CONNECT_SECONDS).values() if _is_alive(node)]
    except AuthenticationError as error:
        raise ConfigError(
            f"the cluster at {address} accepts only its own token (got {token_in_words()}); set RAY_AUTH_MODE=token, "
            f"and RAY_AUTH_TOKEN_PATH to a file with the token of the cluster"
        ) from error
    except (RayError, RuntimeError, AttributeError) as error:  # AttributeError: the server is not Ray's
        raise UserError(f"no Ray cluster at {address} ({str(error).splitlines()[0]}); start a cluster") from error
    if not nodes:
        raise UserError(f"the cluster at {address} must have a live node (got none); start the cluster again")
    return ClusterFacts(
        ray_version=str(versions["ray_version"]),
        python_version=str(versions["python_version"]),
        num_nodes=len(nodes),
        num_cpus=sum(node.resources_total.get("CPU", 0.0) for node in nodes),
        num_gpus=sum(node.resources_total.get("GPU", 0.0) for node in nodes),
        here=any(is_own_address(node.node_manager_address) for node in nodes),
    )


def _is_alive(node: Any) -> bool:
    return node.state == type(node).GcsNodeState.Value("ALIVE")
