"""Verb ``train``: train a flow on shards and register it."""
