"""Loads GGUF files as models of the host.

It imports `packed`, `host` and `quant`.
"""
