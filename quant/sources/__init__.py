"""Checkpoints of any layout and naming, as weights under ComfyUI's names that are read piece by piece.

It imports `gguf`, `files` and `qtype`.
"""
