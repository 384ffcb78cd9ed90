"""Encoders, which turn float32 weights into ggml's blocks: ggml's own algorithms, and a search for less error.

It imports `formats`.
"""
