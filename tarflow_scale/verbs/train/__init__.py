"""Verb ``train``: train a flow or an autoencoder on shards and register it."""
