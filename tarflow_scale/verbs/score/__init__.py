"""Verb ``score``: score how anomalous images are, on Ray."""
