"""Units of work on Ray actors, or in this process. The only user of ray.

A worker is a class with ``__init__(**arguments)`` and ``run(unit) -> result``; its module must be importable on the
worker. A unit must be idempotent, because a lost worker's unit runs again, and a late one's may run twice. Results come
in the order in which units finish; they must not depend on the worker, so both executors give the same answer.

A cluster elsewhere is reached by its address (``host:port``, or ``ray://host:port``), and only with Ray's token
authentication switched on here and there: whoever may submit work to a cluster may run code on it.
"""

from tarflow_scale.pool.address import temporary_folder
from tarflow_scale.pool.look import ClusterFacts, look_at
from tarflow_scale.pool.work import OBJECT_STORE_BYTES, Pool, Worker

__all__ = ["OBJECT_STORE_BYTES", "ClusterFacts", "Pool", "Worker", "look_at", "temporary_folder"]
