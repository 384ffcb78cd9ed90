"""Which tensor gets which type, by recipe or for a size, and how large the file becomes.

It imports `sources` and `gguf`.
"""
