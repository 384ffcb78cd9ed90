"""What was measured of a model's inputs: importance matrices and calibrations, and their files.

It imports `plan`, `sources` and `gguf`.
"""
