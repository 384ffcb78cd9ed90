"""Encoders from float32 weights: ggml's own algorithms, a search for less error, and a rounding for a layer's outputs.

It imports `formats` and `native`.
"""
