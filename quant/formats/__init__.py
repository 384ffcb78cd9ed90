"""ggml's block formats: bytes to integers and floats, and back, bit-exact.

It imports torch, and `device` of this package.
"""
