"""Tuning of a quantized transformer, block by block, for the outputs of the blocks as a whole.

It imports `conversion`, `statistics`, `sources` and `gguf`.
"""
