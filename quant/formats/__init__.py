"""Block formats of ggml: bytes <-> integers and floats, bit-exact.

It imports torch, and `device` of this package.
"""
