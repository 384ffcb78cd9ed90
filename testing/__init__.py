"""Hosts, servers and tiny models that dev.py, the tests and the benchmarks share."""
