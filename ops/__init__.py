"""The ComfyUI side of the pack: weights that stay packed in its memory manager, loading, sampling in a budget.

It imports `quant` and comfy.
"""
