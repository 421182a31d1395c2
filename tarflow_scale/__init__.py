"""tarflow_scale: train, evaluate, promote and sample image normalizing flows at scale.

``load`` reads a flow from a registry or a folder. Each stage of the pipeline is a subpackage.
"""

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tarflow_scale.loading import load

__all__ = ["__version__", "load"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import torch only when ``load`` is used. As in the CLI, torch's waiting threads sleep after a short spin."""
    if name == "load":
        if "torch" not in sys.modules:  # torch reads these settings from the environment when it is loaded
            from tarflow_scale.runtime import cores

            cores.spin_briefly()
        from tarflow_scale.loading import load

        return load
    raise AttributeError(f"module 'tarflow_scale' has no attribute {name!r}")
