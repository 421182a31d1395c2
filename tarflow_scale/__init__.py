"""tarflow_scale: train, evaluate, promote and sample image normalizing flows at scale.

``load`` gives a flow from a registry or a folder; everything else is in the modules, one a stage.
"""

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tarflow_scale.loading import load

__all__ = ["__version__", "load"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import torch only for those who ask for a flow, and have its threads wait as those of the command line do."""
    if name == "load":
        if "torch" not in sys.modules:  # which has read the environment when it was loaded
            from tarflow_scale.runtime import cores

            cores.spin_briefly()
        from tarflow_scale.loading import load

        return load
    raise AttributeError(f"module 'tarflow_scale' has no attribute {name!r}")
