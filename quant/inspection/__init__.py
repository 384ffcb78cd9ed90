"""What a file holds: its report and chart, and its comparison with the source.

It imports `plan`, `sources` and `gguf`.
"""
