"""Latents compared and previewed.

It imports `quant` alone.
"""
