"""Verb ``generate``: write shards of new images from a registered version, on Ray."""
