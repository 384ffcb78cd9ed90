"""Sampling within a number of GiB: what a forward takes, by which plan, and how weights are kept to it.

It imports `lean`, `loading`, `packed`, `host` and `quant`.
"""
