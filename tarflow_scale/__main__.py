"""``python -m tarflow_scale``: the command line, for launchers that start modules."""

import sys

from tarflow_scale.cli import main

if __name__ == "__main__":
    sys.exit(main())
