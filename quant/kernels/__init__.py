"""Quicker ways to dequantize than torch operations, each used where it works.

It imports `qtype`; triton and libggml only at their first use.
"""
