"""Weights that stay packed: tensor layout, Linear, products, and LoRA on them.

It imports `quant` and `host`.
"""
