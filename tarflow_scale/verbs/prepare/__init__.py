"""Verb ``prepare``: pack images into WebDataset shards."""
