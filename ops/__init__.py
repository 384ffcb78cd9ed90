"""The ComfyUI side of the pack: packed weights in ComfyUI's memory manager, loading, and sampling within a budget.

This folder imports `quant` and comfy.
"""
