"""Converted safetensors files: their layout, their metadata, and their headers read as those of models.

It imports `errors`, `files`, `gguf`, `native` and `qtype`.
"""
