"""Verb ``doctor``: check whether this machine and its cluster can do the work."""
