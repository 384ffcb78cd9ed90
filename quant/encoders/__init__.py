"""Encoders, which turn float32 weights into ggml's blocks: ggml's own algorithms, and a search for less error.

The rounding for a layer's outputs serves ComfyUI's formats, too. It imports `formats` and `native`.
"""
