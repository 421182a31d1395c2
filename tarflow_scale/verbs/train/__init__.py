"""Verb ``train``: shards to a registered model version."""
