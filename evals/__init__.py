"""Protocols, gates, results, and the benchmarks that measure them."""
