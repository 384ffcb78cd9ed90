"""Comparison and preview of Wan latents.

It imports `quant` alone.
"""
