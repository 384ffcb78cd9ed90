"""Checkpoints of any layout and naming, as tensors under ComfyUI's names that are read slice by slice.

It imports `gguf`, `files` and `qtype`.
"""
