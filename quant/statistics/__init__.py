"""Statistics of the inputs of a model's layers: importance matrices and calibrations, and their files.

It imports `plan`, `sources` and `gguf`.
"""
