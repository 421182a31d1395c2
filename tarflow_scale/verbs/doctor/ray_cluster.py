"""Check of the Ray cluster: versions, nodes and resources. It starts no work."""

import platform
from importlib import metadata

from tarflow_scale.config.cluster import ClusterConfig
from tarflow_scale.pool import look_at
from tarflow_scale.verbs.doctor.finding import Finding, failed, ok, skipped

__all__ = ["reach"]


def reach(config: ClusterConfig | None) -> list[Finding]:
    """Check that the cluster answers, accepts our token, runs our versions, and has this node and enough resources."""
    if config is None or config.executor == "local" or config.address in (None, "local"):
        return [skipped("cluster", "cluster.address is not set, so work runs on this machine")]
    assert config.address is not None
    state = look_at(config.address)
    if state is None:
        return [ok("cluster", f"{config.address} answers; versions and sizes are known only when work starts")]
    there = f"Ray {state.ray_version} on Python {state.python_version}"
    here = f"Ray {metadata.version('ray')} on Python {platform.python_version()}"
    if there != here:
        return [
            failed(
                "cluster",
                f"{config.address} runs {there}, and this machine has {here}",
                "install the same versions on both",
            )
        ]
    if not state.here:
        advice = f"join it with 'ray start --address={config.address}', or use ray://HOST:10001"
        return [failed("cluster", f"this machine is not a node of {config.address}", advice)]
    workers = config.num_workers
    for name, each, got in (
        ("CPU", config.cpus_per_worker, state.num_cpus),
        ("GPU", config.gpus_per_worker, state.num_gpus),
    ):
        if workers * each > got:
            problem = f"{config.address} has {got:g} {name}s, and each of {workers} workers needs {each}"
            return [failed("cluster", problem, f"lower cluster.num_workers or cluster.{name.lower()}s_per_worker")]
    nodes = f"{state.num_nodes} node{'s' if state.num_nodes > 1 else ''}"
    return [ok("cluster", f"{config.address}: {there}, {nodes}, {state.num_cpus:g} CPUs, {state.num_gpus:g} GPUs")]
