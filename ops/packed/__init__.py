"""Weights that stay packed: their tensor layout, their layers, matrix products with them, and LoRAs on them.

It imports `quant` and `host`.
"""
