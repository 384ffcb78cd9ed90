"""The choice of a type for every tensor, by recipe or for a file size, and the size of the resulting file.

It imports `sources`, `gguf` and `native`.
"""
