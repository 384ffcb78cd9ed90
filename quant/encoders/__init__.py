"""Floats -> block formats: ggml's own rounding, and a search for less error.

It imports `formats`.
"""
