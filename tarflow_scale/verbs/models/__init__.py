"""Verb ``models``: commands on a registry."""
