"""Inspection of a file: a report and a chart of its contents, and its errors against the source.

It imports `plan`, `sources`, `gguf` and `safetensors`.
"""
