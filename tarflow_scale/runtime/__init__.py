"""This process and its machine: ranks, signals, cores, the console, and what made a result."""
