"""Verb ``prepare``: images to WebDataset shards."""
