"""Inspection of a GGUF: a report and a chart of its contents, and its errors against the source.

It imports `plan`, `sources` and `gguf`.
"""
