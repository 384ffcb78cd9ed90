"""Ways to dequantize faster than with torch operations, each used where it works.

It imports `device`, `formats` and `native`; triton and libggml only at their first use.
"""
