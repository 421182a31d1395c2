"""This process and its machine: ranks, signals, CPU cores, the console, and the provenance of results."""
