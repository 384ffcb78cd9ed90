"""Loads GGUF files as models of the host.

This folder imports `packed`, `host` and `quant`.
"""
