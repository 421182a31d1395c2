"""Verb ``encode``: turn packed images into latents of an autoencoder, on Ray."""
