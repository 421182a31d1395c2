"""Units of work on Ray actors, or in this process. The only user of ray.

A worker is a class with ``__init__(**arguments)`` and ``run(unit) -> result``; its module must be importable on the
worker. A unit must be idempotent: the unit of a lost worker runs again, and a unit of a slow worker may run twice.
Results come in the order in which units finish. They must not depend on the worker, so that Ray and one process give
the same answer.

A cluster on other machines is reached by its address (``host:port``, or ``ray://host:port``), and only if Ray's token
authentication is switched on here and there, because a user who may submit work to a cluster may run any code on it.
"""

from tarflow_scale.pool.address import temporary_folder
from tarflow_scale.pool.look import ClusterFacts, look_at
from tarflow_scale.pool.work import OBJECT_STORE_BYTES, Pool, Unit, Worker

__all__ = ["OBJECT_STORE_BYTES", "ClusterFacts", "Pool", "Unit", "Worker", "look_at", "temporary_folder"]
