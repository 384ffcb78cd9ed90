"""Sampling within a number of GiB: the choice of a memory plan, and weights that stay within what it leaves.

It imports `lean`, `loading`, `packed`, `host` and `quant`.
"""
