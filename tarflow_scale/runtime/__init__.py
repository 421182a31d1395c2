"""Properties and control of this process: ranks, signals, CPU cores, console output, provenance of results."""
