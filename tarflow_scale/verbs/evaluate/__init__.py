"""Verb ``evaluate``: measure a registered version by protocols, on Ray."""
