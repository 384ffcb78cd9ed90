"""Weights that stay packed: their tensor layout, their layers, matrix products with them, and LoRAs on them.

This folder imports `quant` and `host`.
"""
