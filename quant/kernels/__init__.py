"""Faster dequantization than by torch operations, each way used where it works.

It imports `device`; triton and libggml only at their first use.
"""
