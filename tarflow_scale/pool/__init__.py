"""Run units of work on Ray actors or in this process. No other part of the package imports ray.

A worker is a class with ``__init__(**arguments)`` and ``run(unit) -> result``; its module must be importable where it
runs. A unit must be idempotent: the unit of a lost worker runs again, and the unit of a slow worker may run twice.
Results come in the order in which units finish. They must not depend on the worker, so that both executors give the
same results.

The address of a remote cluster is ``host:port`` or ``ray://host:port``. Such a cluster is used only if Ray's token
authentication is enabled on both sides, because everyone who can submit work to a cluster can run code on it.
"""

from tarflow_scale.pool.address import temporary_folder
from tarflow_scale.pool.look import ClusterFacts, look_at
from tarflow_scale.pool.work import OBJECT_STORE_BYTES, Pool, Unit, Worker

__all__ = ["OBJECT_STORE_BYTES", "ClusterFacts", "Pool", "Unit", "Worker", "look_at", "temporary_folder"]
